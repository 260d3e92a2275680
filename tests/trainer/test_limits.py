"""Trainer limits that leave nothing to train, or nothing to validate, are named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.trainer.checks.limits import (
    check_evaluated_batches,
    check_limits,
    check_train_batches,
    nothing_trained,
)


def trainer(**settings: Any) -> Trainer:
    plain = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    return Trainer(enable_progress_bar=False, enable_model_summary=False, **plain, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_steps": 0}, r"`max_steps` must leave an optimizer step to train: got 0\. Raise it;"),
        ({"max_epochs": 0}, "`max_epochs` must leave an optimizer step to train: got 0"),
        (
            {"max_epochs": 1, "check_val_every_n_epoch": 0},
            r"`check_val_every_n_epoch` must be above 0: got 0\. To never validate",
        ),
        (
            {"max_epochs": 1, "check_val_every_n_epoch": -2},
            r"`check_val_every_n_epoch` must be above 0: got -2\. To never validate",
        ),
        (
            {"max_epochs": 1, "val_check_interval": 0},
            r"`val_check_interval` must be above 0: got 0\. To never validate, set `limit_val_b",
        ),
        (
            {"max_epochs": 1, "val_check_interval": "00:00:00:00"},
            "`val_check_interval` must be above 0, and no time in a run of several .*: got 0 sec",
        ),
        (
            {"max_epochs": 1, "val_check_interval": {"minutes": 1}, "devices": 2},
            r"whose clocks differ: got 60 seconds\. Give a number of micro-batches\.",
        ),
        ({"max_time": "00:00:00:00"}, r"`max_time` must leave time to train: got 0 seconds\. Rai"),
        ({"max_time": {"minutes": -1}}, "`max_time` must leave time to train: got -60 seconds"),
    ],
)
def test_a_limit_of_nothing_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        check_limits(trainer(**settings))


def test_other_limits_are_accepted() -> None:
    check_limits(trainer(max_steps=-1, max_epochs=-1))
    check_limits(trainer(max_epochs=1, val_check_interval={"minutes": 1}))
    check_limits(trainer(max_steps=1, max_epochs=None, max_time={"seconds": 1}))
    check_limits(trainer(callbacks=[Timer()], fast_dev_run=True))


def test_a_share_that_leaves_no_batch_names_the_limit_that_was_given() -> None:
    words = (
        r"^`overfit_batches`, which limits the validation too, must leave a batch of each set: got "
        r"0\.25 of 2\. Give a number of micro-batches instead of a share, or set `data\.val_prompt"
    )
    given = trainer(overfit_batches=0.25, max_epochs=1)
    check_evaluated_batches(given, "limit_val_batches", [4, 8])
    with pytest.raises(ConfigurationError, match=words):
        check_evaluated_batches(given, "limit_val_batches", [4, 2])
    check_evaluated_batches(given, "limit_test_batches", [1])  # the whole
    for name in ("limit_val_batches", "limit_test_batches", "limit_predict_batches"):
        few = trainer(**{name: 0.3}, max_epochs=1)
        with pytest.raises(ConfigurationError, match=rf"^`{name}` must leave a batch of each set:"):
            check_evaluated_batches(few, name, [3])
    check_evaluated_batches(trainer(limit_val_batches=0, max_epochs=1), "limit_val_batches", [3])


def test_a_limit_of_training_batches_keeps_whole_steps() -> None:
    words = r"`limit_train_batches` must not cut an optimizer step of 2 micro-batches: got 3, which"
    with pytest.raises(ConfigurationError, match=words):
        check_train_batches(
            trainer(accumulate_grad_batches=2, limit_train_batches=3, max_epochs=1), 8
        )
    check_train_batches(trainer(accumulate_grad_batches=2, overfit_batches=4, max_epochs=1), 8)


@pytest.mark.parametrize(
    ("step", "epochs", "most", "words"),
    [
        (8, 1, (8, None), r"`max_steps` 8 was reached before\. Raise it to train on"),
        (8, 2, (-1, 2), r"`max_epochs` 2 was reached before\. Raise it to train on"),
        (8, 2, (9, 3), r"`max_time`, or a callback, ended the run first"),
    ],
)
def test_a_run_with_nothing_left_says_why(
    step: int, epochs: int, most: tuple[int, int | None], words: str
) -> None:
    run: Any = SimpleNamespace(
        global_step=step, max_steps=most[0], max_epochs=most[1], current_epoch=epochs
    )
    assert nothing_trained(run) == words.replace("\\", "")
