"""A teacher with a prompt of its own: what it sees besides the student's, and how it is written."""
