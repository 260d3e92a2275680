"""What every room may use: stopping all processes together, types, and former module names."""
