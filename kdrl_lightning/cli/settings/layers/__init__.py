"""Merges a later file or flag over earlier settings, and notes what it replaces."""
