"""A frozen teacher in this process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdrl_lightning.errors import TrainingStopped
from kdrl_lightning.losses.logprobs import Other, TokenScores
from kdrl_lightning.models import (
    ModelSource,
    check_same_vocabulary,
    load_causal_lm,
    load_config,
    load_tokenizer,
    model_path,
)
from kdrl_lightning.rollout_batch import RolloutBatch
from kdrl_lightning.scorer import Scorer
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.weights import ModelWeights


class LocalTeacher(Teacher):
    """A teacher loaded beside the student, on the same device.

    Args:
        model: a Hugging Face folder, hub name, or model source.
        dtype: torch dtype name of its weights; ``auto`` takes the checkpoint's.
    """

    generates = True
    gives_states = True

    def __init__(self, model: str | ModelSource, dtype: str = "auto") -> None:
        self.model = model
        self.dtype = dtype
        self._scorer: Scorer | None = None
        self._vocab_size: int | None = None

    def prepare(self) -> None:
        """Make the model if its source has to."""
        model_path(self.model)

    def check(self, student_tokenizer: Any, student_path: str) -> None:
        """Compare the two vocabularies; logits are cut to the student's rows."""
        path = model_path(self.model)
        check_same_vocabulary(student_tokenizer, load_tokenizer(path), student_path, path)
        self._vocab_size = load_config(student_path).get_text_config().vocab_size

    def load(self, device: torch.device) -> None:
        """Load and freeze the model once, then move it to ``device``."""
        if self._scorer is None:
            path = model_path(self.model)
            model = load_causal_lm(path, self.dtype)
            self._scorer = Scorer(model.requires_grad_(False), self._vocab_size)
            self._scorer.verify(path)
        self._scorer.to(device)

    @torch.no_grad()
    def score(self, batch: RolloutBatch, topk_ids: Tensor | None = None) -> TokenScores:
        """Score the sampled tokens in one forward pass.

        Raises:
            TrainingStopped: the student sampled a padding row that the teacher does not have.
        """
        return self._known_tokens(batch).score(batch, top_k=1, topk_ids=topk_ids)

    @torch.no_grad()
    def states(self, batch: RolloutBatch) -> Other:
        """Run the forward pass up to the head."""
        return self._known_tokens(batch).states(batch)

    def _known_tokens(self, batch: RolloutBatch) -> Scorer:
        scorer = self._loaded()
        rows, highest = scorer.head().weight.shape[0], int(batch.input_ids.max())
        if highest >= rows:
            raise TrainingStopped(
                f"sampled tokens must be among the teacher's {rows}: got {highest}, a row of the "
                "student's embedding that stands for no token. Train it to avoid such rows first."
            )
        return scorer

    def fingerprint(self) -> str:
        """Digest weights, configuration, and how many rows of the head count."""
        return f"{self.weights().fingerprint()} {self._vocab_size}"

    def weights(self) -> ModelWeights:
        """Return the loaded model and its folder."""
        return ModelWeights(self._loaded().model, model_path(self.model))

    def _loaded(self) -> Scorer:
        if self._scorer is None:
            raise RuntimeError("the teacher is not loaded: call load() first")
        return self._scorer
