"""Folders that hold engines: written, read, checked, rebuilt, looked at."""
