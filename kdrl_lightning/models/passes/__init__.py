"""What one pass of a model reads: shared prompts once, rows of similar length together."""
