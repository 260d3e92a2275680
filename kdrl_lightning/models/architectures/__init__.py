"""What architectures do differently: where their states are, what changes with length, caches."""
