"""The base model of a LoRA student as a teacher or reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdrl_lightning.losses.logprobs import Other, TokenScores
from kdrl_lightning.models.lora import adapters_off
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rollout_batch import RolloutBatch
from kdrl_lightning.teachers.base import Teacher


class AdapterOffTeacher(Teacher):
    """The student with its adapters switched off: the base model, without a second copy of it.

    It scores and gives hidden states. It does not generate: the model at hand is the student's.
    """

    gives_states = True
    needs_lora = True

    def __init__(self) -> None:
        self._student: Scorer | None = None
        self._path = ""

    @property
    def collective(self) -> bool:  # type: ignore[override]
        """Whether the student is sharded."""
        return self._student is not None and self._student.sharded

    @property
    def joins(self) -> bool:  # type: ignore[override]
        """Whether the student runs a prompt once for all its completions."""
        return self._scorer().shares

    def prepare(self) -> None:
        """Do nothing: the student is there."""

    def check(self, student_tokenizer: Any, student_path: str) -> None:
        """Accept: the vocabulary is the student's own."""

    def look_at(self, student: Scorer, path: str) -> None:
        """Remember the student."""
        self._student, self._path = student, path

    def load(self, device: torch.device) -> None:
        """Do nothing: the weights are where the student's are."""

    @torch.no_grad()
    def score(self, batch: RolloutBatch, topk_ids: Tensor | None = None) -> TokenScores:
        """Score the sampled tokens in one forward pass of the student's model."""
        scorer = self._scorer()
        with adapters_off(scorer.model):
            return scorer.score(batch, top_k=1, topk_ids=topk_ids)

    @torch.no_grad()
    def states(self, batch: RolloutBatch) -> Other:
        """Run the forward pass up to the head, which has no adapter."""
        scorer = self._scorer()
        with adapters_off(scorer.model):
            return scorer.states(batch)

    def fingerprint(self) -> str:
        """Digest the base model."""
        return ModelWeights(self._scorer().model, self._path, merged=False).fingerprint()

    def _scorer(self) -> Scorer:
        if self._student is None:
            raise RuntimeError("the teacher has no student: call look_at() first")
        return self._student
