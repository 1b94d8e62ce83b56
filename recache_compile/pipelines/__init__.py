"""All that touches a `diffusers` pipeline."""
