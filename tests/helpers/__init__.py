"""What several tests share: ``from helpers.short_runs import fit``."""
