"""Quality of cached results beside their cost: what `evaluate` measures and `report` shows."""
