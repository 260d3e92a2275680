"""Compares a run's attention kernel and compiled layers with plain layers, on the run's GPU.

``verify`` checks a model on the CPU when it is loaded, where most kernels do not run.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kdrl_lightning.common.untyped import HFModel
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses.head.compiled import OrPlain
from kdrl_lightning.models.architectures.trunk import ON_GPUS, PART, Trunk, use_kernel
from kdrl_lightning.models.architectures.verification import (
    BOUND,
    BOUND_16,
    Verified,
    largest_gap,
    probe_rows,
    spread_of,
)

PLAIN = "eager"


@torch.no_grad()
def check_fast_path(scorer: Verified, trunk: Trunk, name: str) -> None:
    """Compare the scores of a few rows with those of plain layers.

    If compiled layers give other scores, we warn, and all models' layers run uncompiled from then
    on. Call it where the scorer will compute: on its device, in the trainer's precision. If the
    scorer is sharded, all ranks must call it.

    Args:
        scorer: a scorer that is ready to run.
        trunk: attention kernel and compilation of its layers.
        name: the model's name, for messages.

    Raises:
        ConfigurationError: the attention kernel fails, or gives other log-probabilities.
    """
    kernel = trunk.attn_implementation in ON_GPUS
    compiled = trunk.compile and PART not in OrPlain.failed
    if not kernel and not compiled:
        return
    rows, prompts = probe_rows(scorer)
    with _uncompiled():
        with _plain_kernel(scorer.model, trunk.attn_implementation if kernel else None):
            wanted = scorer.chosen(rows, prompts)
            spread = spread_of([scorer.alone(row) for row in rows])
        if kernel:
            _require_kernel(scorer, trunk, name, wanted, spread)
    if not compiled:
        return
    gap, bound = _gap(scorer, scorer.chosen(rows, prompts), wanted, spread)
    if not gap <= bound:  # true for NaN, too
        OrPlain.failed.add(PART)
        warnings.warn(
            f"`compile` must not change a model's log-probabilities: got a difference of {gap:.2g} "
            f"nats for {name} (at most {bound:g}). Its layers run without it.",
            stacklevel=2,
        )


def _require_kernel(
    scorer: Verified, trunk: Trunk, name: str, wanted: list[Tensor], spread: float
) -> None:
    rows, prompts = probe_rows(scorer)
    try:
        gap, bound = _gap(scorer, scorer.chosen(rows, prompts), wanted, spread)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the kernels' packages raise errors of many types
        reason = (str(error).strip() or repr(error)).splitlines()[0]
    else:
        if gap <= bound:
            return
        reason = f"log-probabilities that differ by {gap:.2g} nats, at most {bound:g}"
    raise ConfigurationError(
        f"`attn_implementation` must give the scores of plain attention: got "
        f"{trunk.attn_implementation} for {name} ({reason}). Leave it out, or use sdpa."
    )


def _gap(
    scorer: Verified, found: list[Tensor], wanted: list[Tensor], spread: float
) -> tuple[float, float]:
    """Return the largest difference in nats, and the bound on it that rounding explains."""
    weight = scorer.head().weight
    # A sharded model may compute in fewer bits than its weights have.
    narrow = scorer.sharded or torch.is_autocast_enabled(weight.device.type)
    if narrow or weight.dtype.itemsize < 4:
        return largest_gap(found, wanted, torch.bfloat16), BOUND_16
    return largest_gap(found, wanted, weight.dtype, spread), BOUND


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Run compiled layers uncompiled inside the context."""
    off = PART in OrPlain.failed
    OrPlain.failed.add(PART)
    try:
        yield
    finally:
        if not off:
            OrPlain.failed.discard(PART)


@contextmanager
def _plain_kernel(model: HFModel, name: str | None) -> Iterator[None]:
    """Compute plain attention inside the context, and with the kernel ``name`` after it."""
    if name is not None:
        use_kernel(model, PLAIN)
    try:
        yield
    finally:
        if name is not None:
            use_kernel(model, name)
