"""Save a half-used rollout in a checkpoint, so that a resumed run uses the same completions.

Rows are saved by their group's slot, its number over all processes, so that a run with another
number of processes finds its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

# `Any` in the state: Lightning reads checkpoints as dictionaries of `Any`.
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from kdrl_lightning.common.untyped import State
from kdrl_lightning.rollout.updates import TEACHER_FIELDS
from kdrl_lightning.rollout_batch import RolloutBatch


def pack(batch: RolloutBatch, slots: Sequence[int], pad_id: int) -> State | None:
    """Return a rollout collected from all processes; all ranks must call it.

    Args:
        batch: this rank's completions, scored and prepared.
        slots: slots of this rank's groups (see ``Slots``), indexed by ``group_ids``.
        pad_id: padding token.

    Returns:
        On rank 0 the tensors of all ranks by field name, on the CPU; ``group_ids`` holds the slots,
        and rows are in the order of the slots. None on other ranks.
    """
    group_ids = torch.tensor(slots)[batch.group_ids.cpu()]
    here = _tensors(batch.to("cpu").replace(group_ids=group_ids))
    parts = _gather(here)
    if parts is None:
        return None
    whole = {name: _stack([p[name] for p in parts], _filler(name, pad_id)) for name in here}
    order = torch.argsort(whole["group_ids"], stable=True)
    return {name: value[order] for name, value in whole.items()} | {
        "temperature": batch.temperature,
        "engine_exact": batch.engine_exact,
    }


def unpack(state: State, slots: Sequence[int]) -> RolloutBatch:
    """Return a rank's completions of a saved rollout, with ``group_ids`` from 0 on.

    Args:
        state: the result of ``pack``.
        slots: slots of this rank's groups, in their order.
    """
    known = dict(state)
    if known.pop("teacher_pending", False):  # 0.1 wrote NaN scores if updates run the teacher
        known |= dict.fromkeys(TEACHER_FIELDS)
    everything = RolloutBatch(**known)
    rows, groups = [], []
    for group, slot in enumerate(slots):
        members = (everything.group_ids == slot).nonzero().squeeze(-1).tolist()
        rows += members
        groups += [group] * len(members)
    return everything.select(rows).replace(group_ids=torch.tensor(groups))


def _tensors(batch: RolloutBatch) -> dict[str, Tensor]:
    values = {item.name: getattr(batch, item.name) for item in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _gather(here: dict[str, Tensor]) -> list[dict[str, Tensor]] | None:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return [here]
    first = distributed.get_rank() == 0
    parts: list[Any] | None = [None] * distributed.get_world_size() if first else None
    distributed.gather_object(here, parts)
    return parts


def _filler(name: str, pad_id: int) -> int:
    if name == "teacher_prompt_ids":
        return -1
    return pad_id if name in ("input_ids", "completion_ids") else 0


def _stack(values: list[Tensor], filler: int) -> Tensor:
    if values[0].dim() > 1:
        width = max(v.shape[1] for v in values)
        values = [
            pad(v, (0, 0) * (v.dim() - 2) + (0, width - v.shape[1]), value=filler) for v in values
        ]
    return torch.cat(values)
