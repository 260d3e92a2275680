"""The tables on the CPU that decide how the rows of a batch run."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import TypeAlias, cast

import torch
from torch import Tensor

# Ids ``[B, S]``, prompt lengths ``[B]`` and completion mask ``[B, T]`` of rows.
Rows: TypeAlias = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Layout:
    """Tokens and lengths of B completions, on the CPU.

    Shapes depend on what rows have in common and how long they are, and the host would wait for a
    GPU to learn it. So a batch that moves to a GPU keeps its layout on the CPU, and its parts get
    theirs from it.

    Attributes:
        input_ids: ``[B, S]``, as in ``RolloutBatch``; so are the others.
        prompt_lengths: ``[B]``.
        completion_ids: ``[B, T]``.
        completion_mask: ``[B, T]`` bool.
        teacher_prompt_ids: ``[B, W]``, or None.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    teacher_prompt_ids: Tensor | None

    @property
    def rows(self) -> Rows:
        """Ids, prompt lengths and completion mask."""
        return self.input_ids, self.prompt_lengths, self.completion_mask

    @cached_property
    def sizes(self) -> list[list[int]]:
        """Tokens of each row, of its completion, and of the teacher's own prompt."""
        completions, prompts = self.completion_mask.sum(1), self.teacher_prompt_ids
        own = torch.zeros_like(completions) if prompts is None else (prompts >= 0).sum(1)
        sizes = torch.stack([self.prompt_lengths + completions, completions, own], 1)
        return cast("list[list[int]]", sizes.tolist())

    def on_cpu(self) -> Layout:
        """Return a copy on the CPU; if the tables are on a GPU, the host waits for it once."""
        if self.input_ids.device.type == "cpu":
            return self
        tables = [self.prompt_lengths[:, None], self.input_ids, self.completion_ids]
        tables.append(self.completion_mask.long())
        if self.teacher_prompt_ids is not None:
            tables.append(self.teacher_prompt_ids)
        packed = torch.cat(tables, 1).cpu()
        lengths, ids, completions, mask, *own = packed.split([t.shape[1] for t in tables], 1)
        return Layout(ids, lengths[:, 0], completions, mask.bool(), own[0] if own else None)

    def select(self, rows: Tensor, width: int, tokens: int, longest: int) -> Layout:
        """Return some rows.

        Args:
            rows: ``[R]`` int64, on the CPU.
            width: columns of ``input_ids`` to keep.
            tokens: columns of the completions to keep.
            longest: columns of the teacher's prompts to keep.
        """
        own = self.teacher_prompt_ids
        return Layout(
            self.input_ids[rows, :width],
            self.prompt_lengths[rows],
            self.completion_ids[rows, :tokens],
            self.completion_mask[rows, :tokens],
            None if own is None else own[rows, :longest],
        )


LAYOUT_FIELDS = {item.name for item in fields(Layout)}
