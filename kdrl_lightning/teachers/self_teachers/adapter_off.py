"""A teacher that is the base model of a LoRA student."""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl_lightning.common.untyped import HFTokenizer
from kdrl_lightning.losses.logprobs import Other, TokenScores
from kdrl_lightning.models.lora import adapters_off
from kdrl_lightning.models.pretrained import context_length
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rollout_batch import RolloutBatch
from kdrl_lightning.teachers.base import Teacher


class AdapterOffTeacher(Teacher):
    """Scores with the student's base model: the same weights with the adapters switched off.

    There is no second copy of the model. This teacher returns scores and hidden states; it cannot
    generate, because an engine would sample from the student with its adapters.
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
        """Whether the student runs each prompt once for all its completions."""
        return self._scorer().shares

    @property
    def context_length(self) -> int | None:
        """Maximum length of prompt plus completion, in tokens; None before ``look_at``."""
        return context_length(self._path) if self._path else None

    def prepare(self) -> None:
        """Do nothing: the student is already prepared."""

    def check(self, student_tokenizer: HFTokenizer, student_path: str) -> None:
        """Do nothing: the vocabulary is the student's."""

    def look_at(self, student: Scorer, path: str) -> None:
        """Keep a reference to the student, which was loaded from ``path``."""
        self._student, self._path = student, path

    def load(self, device: torch.device) -> None:
        """Do nothing: the weights are the student's."""

    @torch.no_grad()
    def score(self, batch: RolloutBatch, topk_ids: Tensor | None = None) -> TokenScores:
        """Score the sampled tokens in one forward pass of the base model; see ``Teacher.score``."""
        scorer = self._scorer()
        with adapters_off(scorer.model):
            return scorer.score(batch, top_k=1, topk_ids=topk_ids)

    @torch.no_grad()
    def states(self, batch: RolloutBatch) -> Other:
        """Return the base model's hidden states and its head, which has no adapter."""
        scorer = self._scorer()
        with adapters_off(scorer.model):
            return scorer.states(batch)

    def fingerprint(self) -> str:
        """Return a digest of the base model's configuration and weights."""
        return ModelWeights(self._scorer().model, self._path, merged=False).fingerprint()

    def _scorer(self) -> Scorer:
        if self._student is None:
            raise RuntimeError("the teacher has no student: call look_at() first")
        return self._student
