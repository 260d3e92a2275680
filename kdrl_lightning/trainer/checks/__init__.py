"""Checks before training starts: steps, groups, limits, monitored metrics and devices."""
