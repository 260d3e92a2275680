"""Plans a run before it starts: memory of each phase, disk, seconds, and settings to change."""
