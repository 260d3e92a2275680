"""Columns of files: which must stay text, and which hold lists or dicts written as text."""
