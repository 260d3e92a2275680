"""What a run needs of the hardware, and whether this machine gives it."""
