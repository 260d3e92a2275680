"""A frozen teacher in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kdrl_lightning.errors import TrainingStopped, require_between
from kdrl_lightning.losses.logprobs import Other, TokenScores
from kdrl_lightning.models import (
    ModelSource,
    check_same_vocabulary,
    load_config,
    load_tokenizer,
    model_path,
)
from kdrl_lightning.rollout_batch import RolloutBatch
from kdrl_lightning.scorer import Scorer
from kdrl_lightning.sharding import Sharding, load_scorer
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.weights import ModelWeights


class LocalTeacher(Teacher):
    """A teacher loaded beside the student, on the same device; sharded like it, on its own.

    Args:
        model: a Hugging Face folder, hub name, or model source.
        dtype: torch dtype name of its weights; ``auto`` takes the checkpoint's.
        offload: keep the weights on the CPU and move them over to score: layer by layer under
            fsdp2, else all at once. It then samples slowly where it is not sharded.
        chunk_size: tokens whose logits exist at once; None takes as many as fit about 64 MiB.
    """

    generates = True
    gives_states = True

    def __init__(
        self,
        model: str | ModelSource,
        dtype: str = "auto",
        offload: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        if chunk_size is not None:
            require_between("chunk_size", chunk_size, 1, float("inf"))
        self.model = model
        self.dtype = dtype
        self.offload = offload
        self.chunk_size = chunk_size
        self._scorer: Scorer | None = None
        self._sharding: Sharding | None = None
        self._vocab_size: int | None = None
        self._device = torch.device("cpu")

    @property
    def collective(self) -> bool:  # type: ignore[override]
        """Whether it is sharded."""
        return self._sharding is not None

    def prepare(self) -> None:
        """Make the model if its source has to."""
        model_path(self.model)

    def check(self, student_tokenizer: Any, student_path: str) -> None:
        """Compare the two vocabularies; logits are cut to the student's rows."""
        path = model_path(self.model)
        check_same_vocabulary(student_tokenizer, load_tokenizer(path), student_path, path)
        self._vocab_size = load_config(student_path).get_text_config().vocab_size

    def spread(self, sharding: Sharding | None) -> None:
        """Shard the model over ranks, apart from the student."""
        self._sharding = sharding

    def load(self, device: torch.device) -> None:
        """Load and freeze the model once, then move it to ``device``, or shard it."""
        self._device = device
        if self._scorer is None:
            self._scorer = load_scorer(
                model_path(self.model),
                self.dtype,
                self._sharding,
                vocab_size=self._vocab_size,
                frozen=True,
                offload=self.offload,
                chunk_size=self.chunk_size,
            )
        if self._sharding is not None and not self._scorer.sharded:
            self._sharding.shard(self._scorer, self.offload)
        if not self._scorer.sharded:
            self._scorer.to("cpu" if self.offload else device)

    @torch.no_grad()
    def score(self, batch: RolloutBatch, topk_ids: Tensor | None = None) -> TokenScores:
        """Score the sampled tokens in one forward pass.

        Raises:
            TrainingStopped: the student sampled a padding row that the teacher does not have.
        """
        self.accept(batch)
        with self._at_hand() as scorer:
            return scorer.score(batch, top_k=1, topk_ids=topk_ids)

    @torch.no_grad()
    def states(self, batch: RolloutBatch) -> Other:
        """Run the forward pass up to the head."""
        self.accept(batch)
        with self._at_hand() as scorer:
            return scorer.states(batch)

    def accept(self, batch: RolloutBatch) -> None:
        """Refuse padding rows of the student's vocabulary that the teacher does not have.

        Raises:
            TrainingStopped: the student sampled one.
        """
        rows, highest = self._loaded().head().weight.shape[0], int(batch.input_ids.max())
        if highest >= rows:
            raise TrainingStopped(
                f"sampled tokens must be among the teacher's {rows}: got {highest}, a row of the "
                "student's embedding that stands for no token. Train it to avoid such rows first."
            )

    def fingerprint(self) -> str:
        """Digest weights, configuration, and how many rows of the head count."""
        return f"{self.weights().fingerprint()} {self._vocab_size}"

    def weights(self) -> ModelWeights:
        """Return the loaded model and its folder."""
        return ModelWeights(self._loaded().model, model_path(self.model))

    @contextmanager
    def _at_hand(self) -> Iterator[Scorer]:
        """Have the weights on the device for a while; FSDP2 sees to that itself."""
        scorer = self._loaded()
        moves = self.offload and not scorer.sharded
        try:
            yield scorer.to(self._device) if moves else scorer
        finally:
            if moves:
                scorer.to("cpu")

    def _loaded(self) -> Scorer:
        if self._scorer is None:
            raise RuntimeError("the teacher is not loaded: call load() first")
        return self._scorer
