"""The teachers of a plan: what stands in for them, and what they read."""
