"""A teacher that is the student itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdrl_lightning.common.untyped import HFConfig, HFTokenizer
from kdrl_lightning.errors import ConfigurationError, require_kind
from kdrl_lightning.losses.logprobs import Other, TokenScores
from kdrl_lightning.models.loading import load_config
from kdrl_lightning.models.lora import adapted_layers
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import Sharding, load_scorer
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rollout_batch import RolloutBatch
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.self_teachers.mixed_logits import mix, scores_from
from kdrl_lightning.teachers.self_teachers.other_weights import (
    BaseModel,
    OtherWeights,
    SecondAdapters,
    SecondModel,
)
from kdrl_lightning.teachers.self_teachers.rules import WeightRule


class SelfTeacher(Teacher):
    """Scores with the student's weights: earlier ones, the current ones, or an average.

    With the student's prompt, a self-teacher only keeps the student close to its earlier weights.
    Wrap it in a ``PromptedTeacher`` whose prompt shows more, e.g. the reference answer, and the
    student learns from it.

    It scores a rollout once, with the weights of that moment, in the micro-batches in which the
    student runs; a divergence over the full vocabulary runs it in every update. Either way its
    weights follow the student after each optimizer step, as ``weights`` says. An engine can sample
    from it, except with a ``TrustRegion``; with a LoRA student only with ``LiveWeights``.

    ``docs/methods/self_teachers.md`` compares the rules.

    Args:
        weights: which weights it scores with: ``InitialWeights``, ``LiveWeights``,
            ``MovingAverage``, ``HardSync`` or ``TrustRegion``.

    Raises:
        ConfigurationError: ``weights`` is no ``WeightRule``.
    """

    gives_states = True
    # It scores in the student's micro-batches, so that equal weights give equal numbers.
    joins = False

    def __init__(self, weights: WeightRule) -> None:
        require_kind("weights", weights, WeightRule, "Give one, e.g. InitialWeights().")
        self.rule = weights
        self._student: Scorer | None = None
        self._sharding: Sharding | None = None
        self._other: OtherWeights | None = None
        self._path, self._sharded = "", False
        self._digest: str | None = None

    @property
    def generates(self) -> bool:  # type: ignore[override]
        """Whether one model has the teacher's distribution, so an engine can sample from it."""
        return self.rule.live_share in (0.0, 1.0)

    @property
    def moves(self) -> bool:  # type: ignore[override]
        """Whether the weights follow the student's."""
        return self.rule.kept or self.rule.live_share > 0.0

    @property
    def collective(self) -> bool:  # type: ignore[override]
        """Whether the student is sharded."""
        return self._student is not None and self._student.sharded

    @property
    def vocabulary_rows(self) -> int | None:
        """Rows of the student's embedding; None before ``check``."""
        return int(self._config().vocab_size) if self._path else None

    @property
    def context_length(self) -> int | None:
        """Maximum length of prompt plus completion, in tokens; None before ``check``."""
        return getattr(self._config(), "max_position_embeddings", None) if self._path else None

    def _config(self) -> HFConfig:
        return load_config(self._path).get_text_config()

    def prepare(self) -> None:
        """Do nothing: the student is already prepared."""

    def check(self, student_tokenizer: HFTokenizer, student_path: str) -> None:
        """Keep the student's path: the vocabulary is the student's."""
        self._path = student_path

    def spread(self, sharding: Sharding | None) -> None:
        """Set how the student, and so a second model, is split over ranks."""
        self._sharding = sharding

    def look_at(self, student: Scorer, path: str) -> None:
        """Keep a reference to the student, which was loaded from ``path``."""
        if student is not self._student or student.sharded != self._sharded:
            self._other = self._digest = None  # those of an earlier run's student
        self._student, self._path, self._sharded = student, path, student.sharded

    def score_with(self, other: OtherWeights | None) -> None:
        """Use these weights besides the student's; ``load`` then makes none."""
        self._other = other

    def load(self, device: torch.device) -> None:
        """Make or move the weights besides the student's, if the rule needs any.

        Raises:
            ConfigurationError: the rule mixes logits, and the student's have a soft cap.
        """
        share = self.rule.live_share
        if share == 1.0:
            return
        if share and self._scorer().head().softcap is not None:
            raise ConfigurationError(
                f"`weights` must not be {type(self.rule).__name__} for a student whose logits "
                f"have a soft cap: got {self._path}. Use MovingAverage."
            )
        self._other = self._other or self._made()
        if self._other.module is not None:
            self._other.module.to(device)

    def _made(self) -> OtherWeights:
        student = self._scorer()
        if adapted_layers(student.model):
            return SecondAdapters(student) if self.rule.kept else BaseModel(student)
        sharding = None if self._sharding is None else self._sharding.as_trained()
        second = load_scorer(
            self._path,
            torch.get_default_dtype(),
            sharding,
            frozen=True,
            chunk_size=student.chunk_size,
        )
        made = SecondModel(student, second)
        if self.rule.kept:  # the student may already differ from its folder
            made.follow(1.0)
        return made

    @torch.no_grad()
    def score(self, batch: RolloutBatch, topk_ids: Tensor | None = None) -> TokenScores:
        """Score the sampled tokens; see ``Teacher.score``."""
        student, share = self._scorer(), self.rule.live_share
        if 0.0 < share < 1.0:
            return scores_from(batch, self.states(batch), student.chunk_size, topk_ids)
        if share == 1.0:
            return student.score(batch, top_k=1, topk_ids=topk_ids)
        with self._others().scorer() as scorer:
            return scorer.score(batch, top_k=1, topk_ids=topk_ids)

    @torch.no_grad()
    def states(self, batch: RolloutBatch) -> Other:
        """Return the hidden states and the head."""
        student, share = self._scorer(), self.rule.live_share
        if share == 1.0:
            return student.states(batch)
        with self._others().scorer() as scorer:
            found = scorer.states(batch)
        if not share:
            return found
        # With and without adapters, the head is the same.
        one_head = isinstance(self._other, BaseModel)
        return mix(found, student.states(batch), share, one_head)

    def follow(self, steps: int) -> None:
        """Let the kept weights follow the student after an optimizer step.

        Args:
            steps: optimizer steps so far, without those that were skipped.
        """
        share = self.rule.student_share(steps) if self.rule.kept else 0.0
        if share:
            self._others().follow(share)

    @property
    def kept(self) -> nn.Module | None:
        """The weights that a checkpoint must hold; None if there are none."""
        return self._others().module if self.rule.kept else None

    def initial_digest(self) -> str | None:
        """Return a checksum of the initial student if a second model holds it; else None.

        A resumed run reads that model again, and must find the same one. A LoRA student's base has
        a separate checksum. All ranks must call it.
        """
        if self.rule.kept or not isinstance(self._other, SecondModel):
            return None
        if self._digest is None:
            with self._other.scorer() as scorer:
                self._digest = ModelWeights(scorer.model, self._path).base_digest()
        return self._digest

    def sampling_weights(self) -> ModelWeights:
        """Return the weights that sample the teacher's completions.

        Raises:
            ConfigurationError: they are a LoRA student's base model or second adapters, which no
                engine can load.
        """
        if self.rule.live_share == 1.0:
            return ModelWeights(self._scorer().model, self._path)
        if not isinstance(self._other, SecondModel):
            raise ConfigurationError(
                "`teacher_completions` must be 0 for a LoRA student whose teacher is a SelfTeacher "
                f"with {type(self.rule).__name__}: got more. Use LiveWeights, or a LocalTeacher of "
                f"{self._path}."
            )
        with self._other.scorer() as scorer:
            return ModelWeights(scorer.model, self._path)

    def fingerprint(self) -> str:
        """Return a digest of the initial student's configuration and weights.

        Raises:
            ConfigurationError: the weights change during the run.
        """
        if self.rule.kept or self.rule.live_share:
            raise ConfigurationError(
                "`teacher` must keep its weights to be cached: got SelfTeacher with "
                f"{type(self.rule).__name__}, whose scores change. Remove the CachedTeacher."
            )
        with self._others().scorer() as scorer:
            return ModelWeights(scorer.model, self._path, merged=False).fingerprint()

    def _others(self) -> OtherWeights:
        if self._other is None:
            raise RuntimeError("the teacher has no weights: call load() first")
        return self._other

    def _scorer(self) -> Scorer:
        if self._student is None:
            raise RuntimeError("the teacher has no student: call look_at() first")
        return self._student
