"""The self-check of weights sent by NCCL, with a pretended server: faults it must detect."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrl_lightning.engines.base import Completion, Sampling
from kdrl_lightning.engines.transformers_engine import TransformersEngine
from kdrl_lightning.hardware.doctor.bench import Bench
from kdrl_lightning.hardware.doctor.checks import several
from kdrl_lightning.hardware.doctor.program import Address
from kdrl_lightning.models.weights import ModelWeights


class Server:
    """Samples from a copy of the student; ``late`` pushes arrive one push later."""

    def __init__(self, late: bool) -> None:
        self.late, self.version, self.asked = late, -1, {}  # type: ignore[var-annotated]

    def __call__(self, urls: list[str], key: str, **asked: Any) -> Server:
        self.asked = asked
        return self

    def setup(self, weights: ModelWeights, ends: Any, pad: int) -> None:
        self.model, self.sent = copy.deepcopy(weights.model), []  # type: ignore[var-annotated]
        self.engine = TransformersEngine()
        self.engine.setup(ModelWeights(self.model, weights.path), ends, pad)

    @torch.no_grad()
    def update_weights(self, weights: ModelWeights, version: int) -> None:
        self.sent.append([t.clone() for _, t in weights.named_tensors()])
        held = self.sent[-2 if self.late and len(self.sent) > 1 else -1]
        for (_, mine), tensor in zip(
            self.model.named_parameters(remove_duplicate=False), held, strict=True
        ):
            mine.copy_(tensor)
        self.engine.update_weights(ModelWeights(self.model, weights.path), version)
        self.version = version

    def generate(self, prompts: Any, seeds: Any, sampling: Sampling) -> list[list[Completion]]:
        return self.engine.generate(prompts, seeds, sampling)


@pytest.mark.parametrize("late", [False, True])
def test_a_push_that_is_not_read_right_after_it_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    started: list[Any] = []

    @contextmanager
    def served(bench: Bench, name: str, *flags: str, env: Any) -> Iterator[Address]:
        started.append((flags, env))
        yield Address("http://127.0.0.1:9", "key")

    server = Server(late)
    monkeypatch.setattr(several, "served", served)
    monkeypatch.setattr(several, "VLLMServerEngine", server)
    findings = list(several.by_nccl(Bench(tmp_path, torch.device("cpu"), 0)))
    assert started == [(("--transfer", "nccl"), {"CUDA_VISIBLE_DEVICES": "1"})]
    assert server.asked["transfer"] is True and server.version == 5
    failed = [f.what for f in findings if f.passed is False]
    assert failed == [f"step {n}: difference after the push" for n in (1, 2, 3)] * late
    assert {f.what for f in findings} >= {
        *("first push by NCCL, with its connection", "push by NCCL"),
        *("difference after the last push", "the engine has the last push's version"),
    }
