"""Reads settings: text stays text, and an error names the cause of a mistake."""
