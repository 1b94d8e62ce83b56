"""One self-contained page about an evaluation."""
