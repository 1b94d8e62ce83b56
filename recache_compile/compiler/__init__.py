"""From a model to engines, and from engines to what runs a budget."""
