"""Groups of completions, and a teacher's own prompts in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kdrl_lightning.common.untyped import Row
from kdrl_lightning.engines.base import Completion
from kdrl_lightning.errors import TrainingStopped
from kdrl_lightning.rewards.base import Verdict
from kdrl_lightning.rollout_batch import RolloutBatch, pad_rows


class Attempt(Protocol):
    """A completion and what a context may read about it."""

    @property
    def row(self) -> Row:
        """The prompt's row."""

    @property
    def prompt_ids(self) -> list[int]:
        """Token ids of the student's prompt."""

    @property
    def completion(self) -> Completion:
        """The sampled tokens."""

    @property
    def text(self) -> str:
        """The decoded completion."""

    @property
    def verdict(self) -> Verdict:
        """Its reward and verdict."""


@dataclass(frozen=True)
class Group:
    """The completions of one prompt.

    Attributes:
        attempts: the completions, in the order of the batch.
        other: the row of another prompt of the data; None if no context reads it.
    """

    attempts: Sequence[Attempt]
    other: Row | None = None


@dataclass(frozen=True)
class OwnPrompt:
    """The prompt after which a teacher reads one completion.

    Attributes:
        ids: its token ids.
        has_context: the teacher may be imitated on the completion.
        dropped: there was a context, but its prompt is too long or cannot be rendered.
        end: the token with which the teacher ends the completion; -1: the student's.
    """

    ids: list[int]
    has_context: bool = True
    dropped: bool = False
    end: int = -1


def with_prompts(batch: RolloutBatch, prompts: Sequence[OwnPrompt]) -> RolloutBatch:
    """Return the batch with the teacher's prompt of each completion."""
    device = batch.input_ids.device
    has_context = torch.tensor([p.has_context for p in prompts], dtype=torch.bool, device=device)
    ids = pad_rows([p.ids for p in prompts], -1, torch.long).to(device)
    ends = torch.tensor([p.end for p in prompts], dtype=torch.long, device=device)
    return batch.replace(
        teacher_prompt_ids=ids,
        has_context=has_context,
        teacher_ends=ends if any(p.end >= 0 for p in prompts) else None,
    )


def as_read(batch: RolloutBatch) -> RolloutBatch:
    """Return a batch as its teacher reads it: the same completions after the teacher's prompts.

    Raises:
        TrainingStopped: the batch has no prompts of a teacher.

    >>> from kdrl_lightning.rollout_batch import collate
    >>> batch = collate([[5, 6], [5, 6]], [[7], [8, 9]], [0, 0], pad_id=0)
    >>> own = with_prompts(batch, [OwnPrompt([1, 2, 3]), OwnPrompt([4])])
    >>> as_read(own).input_ids.tolist(), as_read(own).prompt_lengths.tolist()
    ([[1, 2, 3, 7], [4, 8, 9, 0]], [3, 1])
    """
    prompts = batch.teacher_prompt_ids
    if prompts is None:
        raise TrainingStopped(
            "completions must have been sampled with the teacher's own prompt: got some without "
            "one. Use RolloutDataModule; if you resume with another teacher, use a checkpoint "
            "written at the end of a rollout."
        )
    layout = batch.layout
    width = max(completion + own for _, completion, own in layout.sizes)
    ids, lengths = _joined(prompts, batch.completion_ids, width)
    made = batch.replace(input_ids=ids, prompt_lengths=lengths, teacher_prompt_ids=None)
    if layout.teacher_prompt_ids is None or ids.device.type == "cpu":
        return made
    ids, lengths = _joined(layout.teacher_prompt_ids, layout.completion_ids, width)
    same = replace(layout, input_ids=ids, prompt_lengths=lengths, teacher_prompt_ids=None)
    return made.with_layout(same)


def _joined(prompts: Tensor, completion_ids: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return rows ``[B, width]`` of prompt and completion, and the lengths of the prompts."""
    lengths = (prompts >= 0).sum(1)
    place = torch.arange(width, device=prompts.device)
    inside = place < lengths[:, None]
    # After its prompt a row continues with the completion, which begins at column W of the table.
    column = torch.where(inside, place, prompts.shape[1] + place - lengths[:, None])
    table = torch.cat([prompts, completion_ids, torch.zeros_like(lengths)[:, None]], 1)
    return table.gather(1, column.clamp(max=table.shape[1] - 1)), lengths
