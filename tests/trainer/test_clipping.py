"""Clipping of gradients, by the trainer's flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from helpers.short_runs import make_data, make_trainer
from kdrl_lightning import GRPO, KDRLModule

pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")
SMALL: dict[str, Any] = {"val_prompts": None, "prompts_per_rollout": 2}


class Gradients(pl.Callback):
    """Keeps each step's gradients, before and after they are clipped."""

    def __init__(self) -> None:
        self.before: list[list[Tensor]] = []
        self.after: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.before.append(gradients(pl_module))

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if any(p.grad is not None for p in pl_module.parameters()):
            self.after.append(gradients(pl_module))


def gradients(module: Any) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([t.norm() for t in tensors]).norm())


def run(folder: str, path: Path, fused: bool, **trainer: Any) -> tuple[list[Tensor], Gradients]:
    """The weights after two steps, and the gradients."""

    def adamw(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2, fused=fused)

    module, seen = KDRLModule(folder, GRPO(), optimizer=adamw), Gradients()
    made = make_trainer(path, max_steps=2, callbacks=[seen], **trainer)
    made.fit(module, datamodule=make_data(**SMALL))
    return [p.detach() for p in module.parameters()], seen


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_a_fused_optimizer_is_clipped_by_norm(
    tmp_path: Path, student_folder: str, precision: str
) -> None:
    settings = {"precision": precision, "gradient_clip_val": 0.01}
    fused, seen = run(student_folder, tmp_path, True, **settings)
    plain, others = run(student_folder, tmp_path, False, **settings)
    for weights, expected in zip(fused, plain, strict=True):
        torch.testing.assert_close(weights, expected, atol=1e-5, rtol=1e-5)
    assert norm(seen.before[0]) > 0.02
    # 1e-6 is what torch adds to the norm before it divides.
    assert norm(seen.after[-1]) == pytest.approx(0.01, rel=1e-3)
    assert norm(others.after[-1]) == pytest.approx(0.01, rel=1e-3)
    unclipped, _ = run(student_folder, tmp_path, True, precision=precision)
    assert any(not torch.equal(a, b) for a, b in zip(unclipped, fused, strict=True))


def test_clipping_by_value(tmp_path: Path, student_folder: str) -> None:
    settings = {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"}
    _, seen = run(student_folder, tmp_path, True, precision="bf16-mixed", **settings)
    assert max(float(g.abs().max()) for g in seen.before[0]) > 2e-4
    assert max(float(g.abs().max()) for g in seen.after[-1]) == pytest.approx(1e-4)
