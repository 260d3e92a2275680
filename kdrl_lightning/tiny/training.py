"""Supervised training of small models: from weights in one folder to weights in another."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch

from kdrl_lightning.models.loading import ModelSource
from kdrl_lightning.prompts.base import Prompts

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.cli import OptimizerCallable


@contextmanager
def repeatable() -> Iterator[str]:
    """Yield a temporary folder, with torch on one thread; then restore threads and random states.

    With one thread the order of sums, and so the weights, does not depend on the number of cores.
    """
    from lightning.pytorch.utilities.seed import isolate_rng

    threads = torch.get_num_threads()
    with isolate_rng(), tempfile.TemporaryDirectory() as start:
        try:
            torch.set_num_threads(1)
            yield start
        finally:
            torch.set_num_threads(threads)


def train_on_traces(
    student: str | ModelSource,
    traces: Prompts,
    folder: str,
    optimizer: OptimizerCallable,
    rate: Callable[[int], float],
    steps: int,
    batch_size: int,
    name: str,
    seed: int = 0,
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    callbacks: Sequence[pl.Callback] = (),
) -> None:
    """Train a model on worked problems, on a CPU, and write it to ``folder``.

    Args:
        student: the model before training: a folder, a hub name or a model source.
        traces: rows with a ``prompt`` and a ``completion``, ``steps * batch_size`` of them.
        folder: the Hugging Face folder to write.
        optimizer: makes the optimizer from the parameters.
        rate: maps an optimizer step, from 0 on, to a factor of the learning rate.
        steps: number of optimizer steps.
        batch_size: traces per optimizer step; each trace is used once.
        name: name of the model, for the progress bar.
        seed: seed of the order of the traces.
        precision: the trainer's precision.
        callbacks: callbacks besides the progress bar.
    """
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import SingleDeviceStrategy

    from kdrl_lightning.callbacks.progress import RolloutProgress
    from kdrl_lightning.datamodule.supervised import SupervisedDataModule
    from kdrl_lightning.module import KDRLModule
    from kdrl_lightning.objectives import SFT

    module = KDRLModule(
        student=student,
        objective=SFT(),
        optimizer=optimizer,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, rate),
    )
    trainer = pl.Trainer(
        strategy=SingleDeviceStrategy("cpu"),
        max_steps=steps,
        precision=precision,
        gradient_clip_val=1.0,
        callbacks=[*callbacks, RolloutProgress(f"making the {name}")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=SupervisedDataModule(traces, batch_size, seed))
    module.export(folder)


def warmed_up(steps: int) -> Callable[[int], float]:
    """Return a learning-rate factor that rises over the first tenth of the steps, then falls to 0.

    >>> rate = warmed_up(20)
    >>> rate(0), rate(1), rate(11)
    (0.5, 1.0, 0.5)
    """
    warmup = steps // 10

    def rate(step: int) -> float:
        return min((step + 1) / warmup, (steps - step) / (steps - warmup))

    return rate
