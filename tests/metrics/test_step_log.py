"""A step's numbers reach callbacks and loggers as they would through Lightning's own log."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from kdrl_lightning.metrics import StepLog

# How many batches there are, and that a loader could use more workers, is of no interest here.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(does not have many workers|number of training batches)"
)
# The values of each step.
VALUES = [{"loss/a": 1.0}, {"loss/a": 2.5, "kd/b": -1.0}, {"loss/a": 3.0}, {"loss/a": 4.0}]


class Plain(pl.LightningModule):
    """Logs by Lightning's own means."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[dict[str, float]] = []

    def put(self, values: dict[str, float]) -> None:
        self.log_dict(values)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self.put(VALUES[batch_idx // self.trainer.accumulate_grad_batches])
        return self.layer(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Ours(Plain):
    """Logs by a ``StepLog``."""

    def __init__(self) -> None:
        super().__init__()
        self.step_log = StepLog()

    def put(self, values: dict[str, float]) -> None:
        self.step_log.add(self.trainer, values)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self.step_log.write(self.trainer)


class See(pl.Callback):
    """Notes what a callback sees, and adds another number."""

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            pl_module.put({"kd/late": float(trainer.global_step)})
            pl_module.seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})


class Stop(pl.Callback):
    """Stops after the second step."""

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.should_stop = trainer.global_step == 2


def run(
    module: Plain, folder: Path, *others: pl.Callback, **settings: Any
) -> tuple[list[Any], list[Any], set[str]]:
    """Return the rows of the log, what callbacks saw, and what is shown at the end."""
    micro = settings.get("accumulate_grad_batches", 1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=CSVLogger(folder, name=type(module).__name__),
        callbacks=[See(), *others],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    data = torch.utils.data.DataLoader(torch.ones(len(VALUES) * micro, 1), batch_size=1)
    trainer.fit(module, data)
    file = Path(trainer.log_dir or "") / "metrics.csv"
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [dict(sorted(row.items())) for row in csv.DictReader(lines)]
    return rows, module.seen, set(trainer.logged_metrics)


@pytest.mark.parametrize("every", [0, 1, 2, 3, 50])
@pytest.mark.parametrize("micro", [1, 2])
def test_callbacks_and_loggers_get_what_lightning_would_give_them(
    tmp_path: Path, every: int, micro: int
) -> None:
    settings = {"log_every_n_steps": every, "accumulate_grad_batches": micro}
    theirs, ours = (run(make(), tmp_path, **settings) for make in (Plain, Ours))
    assert ours == theirs
    assert len(theirs[0]) == (4 // every if every else 0)


def test_the_step_at_which_a_run_stops_is_logged(tmp_path: Path) -> None:
    theirs, ours = (run(make(), tmp_path, Stop()) for make in (Plain, Ours))
    assert ours == theirs
    assert [row["step"] for row in theirs[0]] == ["1"]


def test_without_logging_the_step_at_which_a_run_stops_is_not_logged_either(
    tmp_path: Path,
) -> None:
    theirs, ours = (run(make(), tmp_path, Stop(), log_every_n_steps=0) for make in (Plain, Ours))
    assert ours == theirs
    assert not theirs[0]


def test_what_was_forgotten_is_not_repeated() -> None:
    trainer, log = Trainer(), StepLog()
    log.add(trainer, {"kd/a": 1.0, "kd/b": 2.0})
    log.write(trainer)
    log.write(trainer)  # a later step of the same rollout
    log.forget()
    log.write(trainer)
    log.add(trainer, {"kd/b": 3.0})
    log.write(trainer)
    first = {"kd/a": 1.0, "kd/b": 2.0, "epoch": 0}
    assert trainer.rows == [first, first, {"kd/b": 3.0, "epoch": 0}]


class Trainer:
    """As much of a trainer as a log needs, and its own logger."""

    def __init__(self) -> None:
        self.strategy = SimpleNamespace(root_device=torch.device("cpu"))
        self.callback_metrics: dict[str, Tensor] = {}
        self.logged_metrics: dict[str, Tensor] = {}
        self.log_every_n_steps, self.should_stop = 1, False
        self.global_step, self.current_epoch = 1, 0
        self.loggers = [self]
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, row: dict[str, float], step: int) -> None:
        self.rows.append(row)

    def save(self) -> None:
        """Nothing is kept."""


def test_nothing_is_written_where_there_is_no_logger(tmp_path: Path) -> None:
    module = Ours()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=[See()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(4, 1), batch_size=1))
    assert [row["loss/a"] for row in module.seen] == [1.0, 2.5, 3.0, 4.0]
    assert not list(tmp_path.iterdir())


def test_a_mean_over_nothing_leaves_a_gap() -> None:
    trainer, log = Trainer(), StepLog()
    log.add(trainer, {"kd/a": 1.0, "rollout/b": 2.0})
    log.write(trainer)
    log.add(trainer, {"kd/a": None, "kd/c": None})
    log.write(trainer)
    assert trainer.rows == [
        {"kd/a": 1.0, "rollout/b": 2.0, "epoch": 0}, {"rollout/b": 2.0, "epoch": 0}
    ]  # fmt: skip
    assert set(trainer.callback_metrics) == set(trainer.logged_metrics) == {"rollout/b"}
