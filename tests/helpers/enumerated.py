"""Language models as tables, for enumerating all texts of a small alphabet with two tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from helpers.reference import normal
from kdrl_lightning.losses.teacher_chunks import chunk_totals
from kdrl_lightning.teachers.cross_tokenizer import Aligner, Chunked, TokenBytes

END = 1


class Model:
    """A language model as a table: the next token's logits for each text so far."""

    def __init__(self, vocabulary: Sequence[int], seed: int) -> None:
        self.vocabulary, self.seed = list(vocabulary), seed
        self.rows: dict[tuple[int, ...], Tensor] = {}

    def logprobs(self, ids: Sequence[int]) -> Tensor:
        """Return ``[T]`` log-probabilities of the tokens."""
        return torch.stack(
            [self.next(ids[:t])[self.vocabulary.index(i)] for t, i in enumerate(ids)]
        )

    def next(self, before: Sequence[int]) -> Tensor:
        key = tuple(before)
        if key not in self.rows:
            seed = self.seed + sum((i + 1) * 31**n for n, i in enumerate(key)) % 99991
            self.rows[key] = normal(len(self.vocabulary), seed=seed).requires_grad_()
        return self.rows[key].log_softmax(-1)

    def gradients(self, value: Tensor) -> dict[tuple[int, ...], Tensor]:
        rows = list(self.rows.items())
        found = torch.autograd.grad(value, [r for _, r in rows], allow_unused=True)
        return {
            k: torch.zeros_like(r) if g is None else g
            for (k, r), g in zip(rows, found, strict=True)
        }


def align(student: object, teacher: object) -> Callable[[Sequence[int]], Chunked]:
    found = Aligner(TokenBytes(student, "s", [END]), TokenBytes(teacher, "t", [END]), [END])
    return lambda ids: found([np.array(ids)], [END])[0]


def sums(model: Model, one: Chunked) -> tuple[Tensor, Tensor]:
    """Return ``[1, T]`` the teacher's sum over each token's chunk, and the chunk places."""
    theirs = model.logprobs(one.teacher_ids.tolist()).detach()[None]
    totals = chunk_totals(theirs, torch.tensor(one.teacher_places)[None])
    return totals.gather(1, torch.tensor(one.columns)[None]), torch.tensor(one.places)[None]
