"""Which tokens a forward pass reads: shared prompts once, rows of similar length together."""
