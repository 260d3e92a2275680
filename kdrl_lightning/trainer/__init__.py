"""Code around Lightning's Trainer: strategies, checks, run folders, signals."""
