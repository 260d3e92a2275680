"""The small random models of ``benchmarks/architectures``."""

from benchmarks.architectures.families import build, families, save

__all__ = ["build", "families", "save"]
