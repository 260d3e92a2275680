"""What every room may use: stopping all processes together, types, and module names of 0.1."""
