"""A frozen teacher that runs in the training process."""

from __future__ import annotations

import torch
from torch import Tensor

from kdrl_lightning.common.untyped import HFTokenizer
from kdrl_lightning.errors import TrainingStopped, require_count
from kdrl_lightning.losses.logprobs import Other, TokenScores
from kdrl_lightning.models.architectures.fast_path import check_fast_path
from kdrl_lightning.models.architectures.trunk import Trunk
from kdrl_lightning.models.end_tokens import end_tokens
from kdrl_lightning.models.loading import (
    ModelSource,
    load_config,
    load_tokenizer,
    model_path,
)
from kdrl_lightning.models.pretrained import context_length
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import Sharding, load_scorer
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rollout_batch import RolloutBatch
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.offload import OffloadedWeights
from kdrl_lightning.teachers.tokenizers import compare


class LocalTeacher(Teacher):
    """Scores and generates with a frozen model on the student's device.

    Under fsdp2 the teacher is sharded like the student, as a separate root.

    Args:
        model: a Hugging Face folder, hub name, or model source.
        dtype: torch dtype name of the weights; ``auto`` uses the checkpoint's.
        offload: keep the weights on the CPU and copy them to the device for scoring: layer by
            layer under fsdp2, else all at once, once per rollout. During scoring, several offloaded
            teachers are on the device at once. A teacher for a divergence over the full vocabulary
            stays there until the next rollout. An offloaded teacher that is not sharded samples
            slowly.
        translate_end_token: if teacher and student end with different tokens (a chat teacher with
            ``<|im_end|>``, a base student with ``<|endoftext|>``), swap the two tokens in the
            teacher's scores, so that its end token counts as the student's.
        chunk_size: tokens whose logits exist at once; None: as many as fit into about 64 MiB, on
            CUDA into 1 GiB.
        attn_implementation: attention kernel, see ``KDRLModule``.
        compile: run the layers through ``torch.compile``, see ``KDRLModule``.
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
        attn_implementation: str | None = None,
        compile: bool = False,
    ) -> None:
        if chunk_size is not None:
            require_count("chunk_size", chunk_size, 1, float("inf"))
        self.model = model
        self.dtype = dtype
        self.offload = offload
        self.translate_end_token = translate_end_token
        self.chunk_size = chunk_size
        self.trunk = Trunk(attn_implementation, compile)
        self._scorer: Scorer | None = None
        self._sharding: Sharding | None = None
        self._vocab_size: int | None = None
        self._ends: tuple[int, int] | None = None  # student's and teacher's, if they differ
        self._end_token_ids: tuple[int, ...] = ()
        self._device = torch.device("cpu")
        self._offloaded: OffloadedWeights | None = None

    @property
    def collective(self) -> bool:  # type: ignore[override]
        """Whether the teacher is sharded."""
        return self._sharding is not None

    @property
    def joins(self) -> bool:  # type: ignore[override]
        """Whether the teacher runs each prompt once for all its completions."""
        return self._loaded().shares

    @property
    def model_name(self) -> str:
        """Folder or hub name of the teacher's model."""
        return model_path(self.model)

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the teacher's embedding."""
        return int(load_config(model_path(self.model)).get_text_config().vocab_size)

    @property
    def context_length(self) -> int:
        """Maximum length of prompt plus completion, in tokens."""
        return context_length(model_path(self.model))

    def prepare(self) -> None:
        """Make the model's folder if its source needs to."""
        model_path(self.model)

    def check(self, student_tokenizer: HFTokenizer, student_path: str) -> None:
        """Compare tokens, end tokens and chat templates with the student's.

        ``load`` then cuts the teacher's logits to the rows of the student's embedding.

        Raises:
            ConfigurationError: vocabularies differ, or the student has no row for the teacher's end
                token.
        """
        path = model_path(self.model)
        tokenizer = load_tokenizer(path)
        self._vocab_size = int(load_config(student_path).get_text_config().vocab_size)
        teacher_ends = end_tokens(path, tokenizer)
        pair = (end_tokens(student_path, student_tokenizer).main, teacher_ends.main)
        ends = compare(student_tokenizer, tokenizer, student_path, path, self._vocab_size, pair)
        self._end_token_ids = tuple(i for i in teacher_ends.ids if i < self._vocab_size)
        self._ends = pair if ends else None
        self.other_end = None if self.translate_end_token else ends

    def spread(self, sharding: Sharding | None) -> None:
        """Set how the teacher is split over ranks; called before ``load``."""
        self._sharding = sharding

    def load(self, device: torch.device) -> None:
        """Load and freeze the model once, then move it to ``device`` or shard it."""
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
                trunk=self.trunk,
            )
            self._scorer.refuse = self._refuse
        if self._sharding is not None and not self._scorer.sharded:
            self._sharding.shard(self._scorer, self.offload)
        if self.offload and not self._scorer.sharded:
            self._offloaded = self._offloaded or OffloadedWeights(self._scorer)
        elif not self._scorer.sharded:
            self._scorer.to(device)

    def check_device(self, device: torch.device) -> None:
        """Refuse an attention kernel that the device does not have."""
        self.trunk.check_device(device)

    def check_fast_path(self) -> None:
        """Check that attention kernel and compiled layers score as plain ones do on the device."""
        check_fast_path(self._on_device(), self.trunk, model_path(self.model))

    def release(self) -> None:
        """Free the device's copy of offloaded weights."""
        if self._offloaded is not None:
            self._offloaded.take_back()

    @torch.no_grad()
    def score(self, batch: RolloutBatch, topk_ids: Tensor | None = None) -> TokenScores:
        """Score the sampled tokens in one forward pass; see ``Teacher.score``.

        Raises:
            TrainingStopped: student or teacher has no row for a token; see ``accept``.
        """
        return self._on_device().score(batch, top_k=1, topk_ids=topk_ids)

    @torch.no_grad()
    def states(self, batch: RolloutBatch) -> Other:
        """Return the hidden states of one forward pass, and the head."""
        return self._on_device().states(batch)

    def accept(self, batch: RolloutBatch) -> None:
        """Refuse token ids for which only one of the two models has a row.

        Raises:
            TrainingStopped: the student sampled a padding row that the teacher does not have, or
                the teacher sampled a token that the student does not have.
        """
        self._refuse(int(batch.input_ids.max()))

    def _refuse(self, highest: int) -> None:
        rows = self._loaded().head().weight.shape[0]
        if highest >= rows:
            raise TrainingStopped(
                f"sampled token ids must be below {rows}, the rows of the teacher's head: got "
                f"{highest}, a padding row of the student's embedding. Train the student to avoid "
                "padding rows first."
            )
        if self._vocab_size is not None and highest >= self._vocab_size:
            raise TrainingStopped(
                f"token ids of the teacher's completions must be below {self._vocab_size}, the "
                f"rows of the student's embedding: got {highest}. Use the teacher for scores only, "
                "or set `teacher_completions.engine` to the transformers engine, which never "
                "samples others."
            )

    def fingerprint(self) -> str:
        """Return a digest of weights, configuration, used rows of the head and swapped tokens."""
        return f"{self.weights().fingerprint()} {self._vocab_size} {self._swap}"

    def weights(self) -> ModelWeights:
        """Return the loaded model with its folder, end tokens and, if cut, number of rows."""
        model, path = self._loaded().model, model_path(self.model)
        rows = model.get_output_embeddings().weight.shape[0]
        cut = self._vocab_size if self._vocab_size and self._vocab_size < rows else None
        return ModelWeights(model, path, end_token_ids=self._end_token_ids or None, vocab_size=cut)

    @property
    def _swap(self) -> tuple[int, int] | None:
        return self._ends if self.translate_end_token else None

    def _on_device(self) -> Scorer:
        """Return the model with offloaded weights on the device; FSDP2 moves sharded ones."""
        scorer = self._loaded()
        if self._offloaded is not None:
            self._offloaded.lend(self._device)
        return scorer

    def _loaded(self) -> Scorer:
        if self._scorer is None:
            raise RuntimeError("the teacher is not loaded: call load() first")
        return self._scorer
