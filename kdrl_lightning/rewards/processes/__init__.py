"""Rewards in processes of their own: time limits, workers, and the sandbox."""
