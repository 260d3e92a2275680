"""The small random models of ``benchmarks/architectures``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "architectures"))

from families import build, families, save

__all__ = ["build", "families", "save"]
