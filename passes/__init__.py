"""Graph rewrites and analyses, one a file."""
