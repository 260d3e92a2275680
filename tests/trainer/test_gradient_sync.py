"""How often fsdp2 reduces gradients, counted inside torch, in a group of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as torchs

from helpers.short_runs import make_data, make_module, make_trainer
from kdrl_lightning import GRPO
from kdrl_lightning.models.weights import full_tensor
from kdrl_lightning.trainer.strategies import FSDP2Strategy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]
UNITS = 2  # one decoder layer, and the scorer around it
STEPS = 2


@pytest.fixture
def reductions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of parameters of each reduction."""
    seen: list[int] = []
    reduce = torchs.foreach_reduce

    def counted(parameters: Any, *rest: Any, **named: Any) -> Any:
        seen.append(len(parameters))
        return reduce(parameters, *rest, **named)

    monkeypatch.setattr(torchs, "foreach_reduce", counted)
    yield seen
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(
    path: Path, folder: str, accumulate: int, strategy: Any, precision: str
) -> list[torch.Tensor]:
    data = make_data(val_prompts=None, prompts_per_rollout=4, minibatches_per_rollout=1)
    module = make_module(folder, None, GRPO())
    make_trainer(
        path,
        strategy=strategy,
        devices=1,
        max_steps=STEPS,
        accumulate_grad_batches=accumulate,
        precision=precision,
    ).fit(module, datamodule=data)
    return [full_tensor(p.detach()) for p in module.parameters()]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_reduced_once_per_optimizer_step(
    tmp_path: Path, student_folder: str, reductions: list[int], precision: str
) -> None:
    once = run(tmp_path, student_folder, 4, "fsdp2", precision)
    assert len(reductions) == UNITS * STEPS
    reductions.clear()
    often = run(tmp_path, student_folder, 4, FSDP2Strategy(reduce_each_micro_batch=True), precision)
    assert len(reductions) == UNITS * STEPS * 4
    for a, b in zip(once, often, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    reductions.clear()
    run(tmp_path, student_folder, 1, "fsdp2", precision)
    assert len(reductions) == UNITS * STEPS
