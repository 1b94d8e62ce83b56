"""Schedule policies, one a file."""
