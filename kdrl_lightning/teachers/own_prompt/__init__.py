"""A teacher with its own prompt: what it shows besides the question, and how it is written."""
