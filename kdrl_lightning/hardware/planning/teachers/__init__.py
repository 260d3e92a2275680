"""Teachers in a plan: their stand-ins with fake weights, and how many tokens they read."""
