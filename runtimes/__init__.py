"""Backends, one a file, and the dispatcher that drives them."""
