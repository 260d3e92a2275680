"""Engines get the current weights, whatever state torch is in when a run syncs them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kdrl_lightning.engines.base import RolloutEngine
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rewards import RewardRunner
from kdrl_lightning.rollout.live import LiveSampler


class Copying(RolloutEngine):
    """Allocates a copy of the weights when it starts or first gets them, and fills it again later.

    Args:
        early: it allocates when it starts.
    """

    compared = False

    def __init__(self, early: bool) -> None:
        self.early = early
        self.copy: dict[str, torch.Tensor] = {}

    def setup(self, weights: ModelWeights, eos_token_id: Any, pad_token_id: int) -> None:
        if self.early:
            self._allocate(weights)

    def update_weights(self, weights: ModelWeights, version: int) -> None:
        if not self.copy:
            self._allocate(weights)
        for name, tensor in weights.named_tensors():
            self.copy[name].copy_(tensor)
        self.version = version

    def _allocate(self, weights: ModelWeights) -> None:
        self.copy = {name: torch.empty(t.shape) for name, t in weights.named_tensors()}

    def generate(self, prompts: Any, seeds: Any, sampling: Any) -> Any:
        raise AssertionError


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 2)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding


@pytest.mark.parametrize("early", [True, False])
def test_an_engine_that_starts_in_inference_mode_takes_weights_in_training(early: bool) -> None:
    # Lightning evaluates in inference mode by default: a validation may be the first to sample.
    weights = ModelWeights(Model(), "some/model")
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1)
    module: Any = SimpleNamespace(tokenizer=tokenizer, end_tokens=SimpleNamespace(ids=(1,)))
    module.vocabulary_rows, module.weights = 8, lambda: weights
    trainer: Any = SimpleNamespace(global_step=0, precision="32-true", optimizers=[])
    sampler, engine = LiveSampler(RewardRunner(lambda sample: 0.0)), Copying(early)
    sampler.join(trainer, module)
    with torch.inference_mode():
        sampler.sync(engine, weights)
    with torch.no_grad():
        weights.model.embedding.weight.add_(1.0)
    trainer.global_step = 1
    sampler.sync(engine, weights)
    assert engine.version == 1
    assert torch.equal(engine.copy["embedding.weight"], weights.model.embedding.weight)
