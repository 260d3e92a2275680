"""Columns of files: what their cells say, and cells that hold a list or a dict as text."""
