"""The base class of callbacks that act at the start or the end of a rollout."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from helpers.plain_module import OneWeight
from helpers.short_runs import fit, make_data, make_module, make_trainer
from kdrl_lightning import GRPO
from kdrl_lightning.callbacks import FSDPCheckpoint, RolloutCallback
from kdrl_lightning.callbacks.base import ends_step, updates_per_rollout
from kdrl_lightning.trainer.protocols import rollout_data

# A random model stops late and is rarely right.
pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")


class Seen(RolloutCallback):
    """Notes each call with the number of optimizer steps at that time."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def on_rollout_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, rollout: int
    ) -> None:
        self.calls.append(("start", rollout, trainer.global_step))

    def on_step_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.calls.append(("step", -1, trainer.global_step))

    def on_rollout_end(self, trainer: pl.Trainer, pl_module: Any, rollout: int) -> None:
        self.calls.append(("end", rollout, trainer.global_step))


def expected(first: int, last: int, each: int) -> list[tuple[str, int, int]]:
    """Return the calls of steps ``first + 1 .. last``, with ``each`` steps per rollout."""
    calls = []
    for step in range(first, last):
        if step % each == 0:
            calls.append(("start", step // each, step))
        calls.append(("step", -1, step + 1))
        if (step + 1) % each == 0:
            calls.append(("end", step // each, step + 1))
    return calls


@pytest.mark.parametrize(
    ("accumulate", "minibatches", "epochs", "steps"),
    [(1, 1, 1, 3), (2, 2, 1, 4), (2, 2, 2, 8), (1, 2, 2, 6)],  # the last one cuts a rollout
)
def test_it_counts_rollouts(
    tmp_path: Path, student_folder: str, accumulate: int, minibatches: int, epochs: int, steps: int
) -> None:
    data = make_data(
        minibatches_per_rollout=minibatches, epochs_per_rollout=epochs, val_prompts=None
    )
    seen, module = Seen(), make_module(student_folder, None, GRPO())
    settings: dict[str, Any] = {"max_steps": steps, "accumulate_grad_batches": accumulate}
    fit(tmp_path, module, data, [seen], **settings)
    assert seen.calls == expected(0, steps, minibatches * epochs)


def test_a_run_that_goes_on_in_the_middle_of_a_rollout_counts_on(
    tmp_path: Path, student_folder: str
) -> None:
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "enable_checkpointing": True}

    def run(steps: int, ckpt_path: str | None) -> tuple[list[tuple[str, int, int]], str]:
        seen, saver = Seen(), FSDPCheckpoint(monitor=None)
        data = make_data(epochs_per_rollout=2, val_prompts=None)  # four steps on a rollout
        trainer = make_trainer(tmp_path, callbacks=[seen, saver], max_steps=steps, **settings)
        module = make_module(student_folder, None, GRPO())
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return seen.calls, saver.last_model_path

    calls, path = run(6, None)
    assert calls == expected(0, 6, 4)
    assert run(9, path)[0] == expected(6, 9, 4)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_without_rollouts_each_optimizer_step_counts(tmp_path: Path) -> None:
    seen = Seen()
    settings: dict[str, Any] = {"max_steps": 4, "accumulate_grad_batches": 2, "logger": False}
    trainer = make_trainer(tmp_path, callbacks=[seen], **settings)
    # Five batches: Lightning takes a step after the last one alone.
    trainer.fit(OneWeight(), DataLoader(torch.arange(5)))  # type: ignore[arg-type]
    assert seen.calls == expected(0, 4, 1)


def test_a_trainer_without_data_module_has_no_rollouts() -> None:
    trainer: Any = SimpleNamespace(datamodule=None, accumulate_grad_batches=3)
    trainer.num_training_batches = float("inf")
    assert rollout_data(trainer) is None and updates_per_rollout(trainer) == 1
    assert [ends_step(trainer, i) for i in range(4)] == [False, False, True, False]
