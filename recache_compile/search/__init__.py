"""Schedules found on the true loss."""
