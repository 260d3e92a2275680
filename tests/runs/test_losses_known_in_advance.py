"""Whole runs take the same steps whether the backward pass recomputes logits or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from helpers.short_runs import fit, make_data, make_module
from kdrl_lightning import GKD, GRPO, KDRL, LoRA
from kdrl_lightning.losses import logprobs
from kdrl_lightning.losses.head.head_products import HeadProducts
from kdrl_lightning.objectives import GSPO, Objective

# A random model stops late and is rarely right.
pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")


class Rows(pl.Callback):
    """Counts the rows of logits that a run's updates make."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made, self.scored, self._on = 0, 0, False
        inner = HeadProducts.logits

        def counted(head: HeadProducts, hidden: Tensor) -> Tensor:
            self.made += len(hidden) * self._on
            return inner(head, hidden)

        monkeypatch.setattr(HeadProducts, "logits", counted)

    def on_train_batch_start(self, *_: Any) -> None:
        self._on = True

    def on_train_batch_end(self, *_: Any) -> None:
        self._on = False


def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: Any, objective: Objective, lora: Any
) -> tuple[dict[str, Tensor], int]:
    student, teacher = parts
    torch.manual_seed(0)
    needs = objective.needs_teacher
    module = make_module(student, teacher if needs else None, objective, "float64", lora)
    rows = Rows(monkeypatch)
    fit(
        tmp_path,
        module,
        make_data(epochs_per_rollout=2, rollouts_per_epoch=1),
        [rows],
        precision="64-true",
        accumulate_grad_batches=3,
        max_steps=4,
    )
    assert module.student is not None
    return {n: p.detach() for n, p in module.student.named_parameters()}, rows.made


@pytest.mark.parametrize(
    ("objective", "lora"),
    [
        (lambda: KDRL(entropy_coef=0.01, ref_kl_coef=0.1), None),
        (lambda: GKD(jsd_beta=0.5), None),
        (lambda: KDRL(kl_estimator="full_vocabulary"), None),
        (GRPO, LoRA(rank=2)),
        (GSPO, None),
    ],
    ids=["kdrl", "gkd", "kdrl-full", "lora", "gspo"],
)
def test_steps_are_those_of_the_plain_pass(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    student_folder: str,
    teacher_folder: str,
    objective: Any,
    lora: Any,
) -> None:
    parts, seen = (student_folder, teacher_folder), []
    monkeypatch.setattr(logprobs, "MAX_CHUNK", 8)
    for pays_from in (float("inf"), 0.0):
        with monkeypatch.context() as context:
            context.setitem(logprobs.PAYS_FROM, "cpu", pays_from)
            seen.append(run(tmp_path / str(pays_from), context, parts, objective(), lora))
    (plain, twice), (ahead, once) = seen
    assert once == (twice if objective is GSPO else twice // 2) > 0
    for name, weight in plain.items():
        # transformers' RMSNorm rounds to float32 inside: later steps are equal only to that.
        torch.testing.assert_close(ahead[name], weight, rtol=1e-6, atol=1e-9)
