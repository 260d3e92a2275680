"""Teachers with their own prompt: what it shows besides the question, and how it is written."""
