"""The commands of `recache-compile`, one a file."""
