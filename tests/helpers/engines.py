"""Engines that are ready to sample, and what they return."""

from __future__ import annotations

from typing import Any

from kdrl_lightning.engines import Completion, TransformersEngine
from kdrl_lightning.models.weights import ModelWeights


def engine_for(model: Any, path: str = "some/model") -> TransformersEngine:
    """Return an engine with a model's weights; token 1 is the end token."""
    engine, weights = TransformersEngine(), ModelWeights(model, path)
    engine.setup(weights, 1, 0)
    engine.update_weights(weights, 0)
    return engine


def ids(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.ids for c in group] for group in groups]
