"""A teacher with its own prompt: what it sees besides the student's, and how it is written."""
