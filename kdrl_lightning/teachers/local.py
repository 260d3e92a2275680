"""A frozen teacher in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kdrl_lightning.errors import TrainingStopped, require_between
from kdrl_lightning.losses.logprobs import Other, TokenScores
from kdrl_lightning.models.end_tokens import end_tokens
from kdrl_lightning.models.loading import (
    ModelSource,
    load_config,
    load_tokenizer,
    model_path,
)
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import Sharding, load_scorer
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rollout_batch import RolloutBatch
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.tokenizers import compare


class LocalTeacher(Teacher):
    """A teacher loaded beside the student, on the same device; sharded like it, on its own.

    Args:
        model: a Hugging Face folder, hub name, or model source.
        dtype: torch dtype name of its weights; ``auto`` takes the checkpoint's.
        offload: keep the weights on the CPU and move them over to score: layer by layer under
            fsdp2, else all at once. It then samples slowly where it is not sharded.
        translate_end_token: where it ends with another token than the student (a chat teacher's
            ``<|im_end|>``, a base student's ``<|endoftext|>``), read its end as the student's: the
            two tokens change places in all that it says of a completion.
        chunk_size: tokens whose logits exist at once; None takes as many as fit about 64 MiB.
    """

    generates = True
    gives_states = True

    def __init__(
        self,
        model: str | ModelSource,
        dtype: str = "auto",
        offload: bool = False,
        translate_end_token: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        if chunk_size is not None:
            require_between("chunk_size", chunk_size, 1, float("inf"))
        self.model = model
        self.dtype = dtype
        self.offload = offload
        self.translate_end_token = translate_end_token
        self.chunk_size = chunk_size
        self._scorer: Scorer | None = None
        self._sharding: Sharding | None = None
        self._vocab_size: int | None = None
        self._ends: tuple[int, int] | None = None  # the student's, its own, if they differ
        self._end_token_ids: tuple[int, ...] = ()
        self._device = torch.device("cpu")

    @property
    def collective(self) -> bool:  # type: ignore[override]
        """Whether it is sharded."""
        return self._sharding is not None

    @property
    def joins(self) -> bool:  # type: ignore[override]
        """Whether it runs a prompt once for all its completions, in this process."""
        return self._loaded().shares

    @property
    def model_name(self) -> str:
        """Folder or hub name of the model."""
        return model_path(self.model)

    @property
    def vocabulary_rows(self) -> int:
        """Rows of its embedding."""
        return int(load_config(model_path(self.model)).get_text_config().vocab_size)

    def prepare(self) -> None:
        """Make the model if its source has to."""
        model_path(self.model)

    def check(self, student_tokenizer: Any, student_path: str) -> None:
        """Compare tokens, end tokens and chat templates; logits are cut to the student's rows."""
        path = model_path(self.model)
        tokenizer = load_tokenizer(path)
        self._vocab_size = int(load_config(student_path).get_text_config().vocab_size)
        own = end_tokens(path, tokenizer)
        pair = (end_tokens(student_path, student_tokenizer).main, own.main)
        ends = compare(student_tokenizer, tokenizer, student_path, path, self._vocab_size, pair)
        self._end_token_ids = tuple(i for i in own.ids if i < self._vocab_size)
        self._ends = pair if ends else None
        self.other_end = None if self.translate_end_token else ends

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
                swap=self._swap,
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
        """Refuse tokens that only one of the two has a row for.

        Raises:
            TrainingStopped: the student sampled a padding row, or the teacher a token, that is
                behind the other's last row.
        """
        rows, highest = self._loaded().head().weight.shape[0], int(batch.input_ids.max())
        if highest >= rows:
            raise TrainingStopped(
                f"sampled tokens must be among the teacher's {rows}: got {highest}, a row of the "
                "student's embedding that stands for no token. Train it to avoid such rows first."
            )
        if self._vocab_size is not None and highest >= self._vocab_size:
            raise TrainingStopped(
                f"the teacher's completions must be of the student's {self._vocab_size} tokens: "
                f"got {highest}. Let the teacher only score, or take the transformers engine as "
                "`teacher_completions.engine`, which samples from those alone."
            )

    def fingerprint(self) -> str:
        """Digest weights, configuration, how many rows of the head count, and which ones swap."""
        return f"{self.weights().fingerprint()} {self._vocab_size} {self._swap}"

    def weights(self) -> ModelWeights:
        """Return the loaded model and its folder, and how it differs from the student."""
        model, path = self._loaded().model, model_path(self.model)
        rows = model.get_output_embeddings().weight.shape[0]
        cut = self._vocab_size if self._vocab_size and self._vocab_size < rows else None
        return ModelWeights(model, path, end_token_ids=self._end_token_ids or None, vocab_size=cut)

    @property
    def _swap(self) -> tuple[int, int] | None:
        return self._ends if self.translate_end_token else None

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
