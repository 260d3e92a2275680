"""Rewards and functions that other processes import by name."""
