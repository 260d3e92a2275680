"""Differences between architectures: hidden states, effects of length, attention, caches."""
