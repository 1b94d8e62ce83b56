"""Side by side: a model uncached, ours, and the caches that people use today, in one run."""
