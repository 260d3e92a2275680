"""Handles what differs between architectures: hidden states, attention, effects of length."""
