"""Helpers that all other packages here may import: stopping all processes, types, old names."""
