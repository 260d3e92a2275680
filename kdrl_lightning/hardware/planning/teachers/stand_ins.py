"""Builds the teacher of a rehearsal: the configured one, with fake weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdrl_lightning.losses.logprobs import Other, TokenScores
from kdrl_lightning.models.lora import adapted_layers
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.rollout_batch import RolloutBatch, collate
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.cross_tokenizer.teacher import CrossTokenizerTeacher
from kdrl_lightning.teachers.local import LocalTeacher
from kdrl_lightning.teachers.own_prompt.teacher import PromptedTeacher
from kdrl_lightning.teachers.routed import RoutedTeacher
from kdrl_lightning.teachers.self_teachers import SelfTeacher, self_teachers
from kdrl_lightning.teachers.self_teachers.adapter_off import AdapterOffTeacher
from kdrl_lightning.teachers.self_teachers.found import walk
from kdrl_lightning.teachers.self_teachers.other_weights import (
    BaseModel,
    OtherWeights,
    SecondAdapters,
    SecondModel,
)
from kdrl_lightning.teachers.wrapped import WrappedTeacher

# `Any`: transformers has no type that all tokenizers share.


class Elsewhere(Teacher):
    """Stands in for a teacher on other devices, which costs this rank nothing."""

    def prepare(self) -> None:
        """Do nothing."""

    def check(self, student_tokenizer: Any, student_path: str) -> None:
        """Do nothing."""

    def load(self, device: torch.device) -> None:
        """Do nothing."""

    @torch.no_grad()
    def score(self, batch: RolloutBatch, topk_ids: Tensor | None = None) -> TokenScores:
        """Return zeros."""
        zeros = torch.zeros(batch.completion_ids.shape)
        top = None if topk_ids is None else torch.zeros(topk_ids.shape)
        return TokenScores(zeros, zeros, batch.completion_ids[..., None], top, None, zeros)


class Weightless(Elsewhere):
    """Stands in for a ``LocalTeacher``: a frozen model with fake weights.

    Args:
        scorer: the scorer of the model.
    """

    gives_states = True

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    @property
    def joins(self) -> bool:  # type: ignore[override]
        """Whether the model runs a prompt once for all its completions, as the scorer does."""
        return self.scorer.shares

    @torch.no_grad()
    def score(self, batch: RolloutBatch, topk_ids: Tensor | None = None) -> TokenScores:
        """Score in one forward pass."""
        return self.scorer.score(batch, top_k=1, topk_ids=topk_ids)

    @torch.no_grad()
    def states(self, batch: RolloutBatch) -> Other:
        """Return the hidden states of one forward pass, and the head."""
        return self.scorer.states(batch)


class OtherTokens(WrappedTeacher):
    """Stands in for a ``CrossTokenizerTeacher``, which reads completions in other tokens.

    Args:
        teacher: the wrapped teacher.
        share: the teacher's tokens per token of the student.
        rows: number of rows of the teacher's embedding.
    """

    has_own_prompt = True
    aligns = True
    knows_entropy = False

    def __init__(self, teacher: Teacher, share: float, rows: int) -> None:
        super().__init__(teacher)
        self.share, self.rows = share, rows

    @torch.no_grad()
    def score(self, batch: RolloutBatch, topk_ids: Tensor | None = None) -> TokenScores:
        """Score as many tokens as the teacher reads; each token of the student is a chunk."""
        assert batch.teacher_prompt_ids is not None
        many = math.ceil(self.share)
        completions = [
            [i % self.rows for i in row[:length] * many][: math.ceil(self.share * length)]
            for row, length in zip(
                batch.completion_ids.tolist(), batch.completion_lengths.tolist(), strict=True
            )
        ]
        prompts = [[i for i in row if i >= 0] for row in batch.teacher_prompt_ids.tolist()]
        read = collate(prompts, completions, batch.group_ids.tolist(), pad_id=0)
        self.teacher.score(read.replace(teacher_prompt_ids=batch.teacher_prompt_ids))
        shape = batch.completion_ids.shape
        places = torch.zeros(shape, dtype=torch.long)
        return TokenScores(torch.zeros(shape), None, chunk_places=places)


class Stand:
    """Builds the stand-in of a teacher.

    Args:
        student: the student of the rehearsal.
        frozen: builds the model of a ``LocalTeacher``.
        second: builds a second, frozen copy of the student.
        share: the teacher's tokens per token of the student; None: both use the same tokens.

    Attributes:
        models: all frozen models that it has built.
    """

    def __init__(
        self,
        student: Scorer,
        frozen: Callable[[LocalTeacher], Scorer],
        second: Callable[[], Scorer],
        share: float | None,
    ) -> None:
        self.student, self.share = student, share
        self._frozen, self._second = frozen, second
        self.models: list[Scorer] = []

    def of(self, teacher: Teacher) -> Teacher:
        """Return the stand-in of a teacher and of all that it wraps."""
        if isinstance(teacher, LocalTeacher):
            self.models.append(self._frozen(teacher))
            return Weightless(self.models[-1])
        if isinstance(teacher, SelfTeacher):
            made = SelfTeacher(teacher.rule)
            made.look_at(self.student, "")
            made.score_with(self._others(teacher))
            return made
        if isinstance(teacher, AdapterOffTeacher):
            base = AdapterOffTeacher()
            base.look_at(self.student, "")
            return base
        if isinstance(teacher, PromptedTeacher):
            return PromptedTeacher(self.of(teacher.teacher), teacher.prompt)
        if isinstance(teacher, CrossTokenizerTeacher) and self.share is not None:
            before = len(self.models)
            inner = self.of(teacher.teacher)
            rows = min((len(m.head().weight) for m in self.models[before:]), default=1)
            return OtherTokens(inner, self.share, rows)
        if isinstance(teacher, RoutedTeacher):
            return self._largest(teacher)
        if isinstance(teacher, WrappedTeacher):  # a cache, or a teacher with the student's tokens
            return self.of(teacher.teacher)
        return Elsewhere()

    def _others(self, teacher: SelfTeacher) -> OtherWeights | None:
        if teacher.rule.live_share == 1.0:
            return None
        if adapted_layers(self.student.model):
            kept = teacher.rule.kept
            return SecondAdapters(self.student) if kept else BaseModel(self.student)
        self.models.append(self._second())
        return SecondModel(self.student, self.models[-1])

    def _largest(self, teacher: RoutedTeacher) -> Teacher:
        """Return the stand-in with the most weights; it may get all completions of a pass."""
        made: list[tuple[int, Teacher]] = []
        for inner in teacher.teachers.values():
            before = len(self.models)
            found = self.of(inner)
            new = self.models[before:]
            made.append((sum(p.numel() for m in new for p in m.parameters()), found))
        return max(made, key=lambda pair: pair[0])[1]


def follows_student(teacher: Teacher | None) -> bool:
    """Return whether a teacher computes with the student's weights."""
    with_adapters = any(isinstance(found, AdapterOffTeacher) for found, _ in walk(teacher))
    return with_adapters or bool(self_teachers(teacher))


def local_teachers(teacher: Any) -> list[LocalTeacher]:
    """Return all ``LocalTeacher``s among a teacher and those that it wraps."""
    return [found for found, _ in walk(teacher) if isinstance(found, LocalTeacher)]
