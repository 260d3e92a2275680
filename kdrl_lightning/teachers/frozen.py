"""The frozen models of a run: the teacher, and the reference, by default the initial student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdrl_lightning.common.clock import ScoringClock
from kdrl_lightning.common.untyped import HFTokenizer, Row
from kdrl_lightning.engines.base import Completion
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses.logprobs import LOGPROB_FLOOR, Other, TokenScores
from kdrl_lightning.models.architectures.trunk import Trunk
from kdrl_lightning.models.loading import ModelSource
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import Sharding
from kdrl_lightning.rollout_batch import RolloutBatch
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.local import LocalTeacher
from kdrl_lightning.teachers.own_prompt.groups import Group, with_prompts
from kdrl_lightning.teachers.own_top_k import own_top_k
from kdrl_lightning.teachers.self_teachers import check_self_teachers, kinds_of_self, self_teachers
from kdrl_lightning.teachers.self_teachers.adapter_off import AdapterOffTeacher
from kdrl_lightning.teachers.tokenizers import check_end_tokens, check_sampled

# `Any`: an objective; `teachers` must not import `objectives`.


class FrozenModels:
    """Loads and moves the teacher and the reference, and scores batches with them.

    It is not a submodule, so no optimizer or checkpoint holds these models, except that checkpoints
    hold the weights of a self-teacher that follow the student's (``kept``).

    Args:
        teacher: the configured teacher, if there is one.
        reference: the configured reference, which replaces the initial student.

    Attributes:
        active: the teacher that this run uses; None if it uses none, e.g. an evaluation.
        reference: the initial student, or the configured model; None if nothing reads it.
    """

    def __init__(self, teacher: Teacher | None, reference: Teacher | None = None) -> None:
        self._teacher = teacher
        self._reference = reference
        self.active = teacher
        self.reference: Teacher | None = None
        self._clock = ScoringClock()
        self._dropped = 0
        self._lost = 0
        self._device = torch.device("cpu")

    @property
    def seconds(self) -> float:
        """How long the teacher has scored so far in this run, in seconds."""
        return self._clock.seconds

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._clock.seconds = value

    @property
    def joins(self) -> bool:
        """Whether all models may score several micro-batches at once."""
        return all(model.joins for model in self._models())

    @property
    def collective(self) -> bool:
        """Whether a model needs all ranks to score, so that no rank may stop alone."""
        return any(model.collective for model in self._models())

    def prepare(self) -> None:
        """Make or download the configured models; one process calls it."""
        for model in (self._teacher, self._reference):
            if model is not None:
                model.prepare()

    @property
    def kinds(self) -> list[str]:
        """The kinds of the configured self-teachers; a resumed run must have the same ones."""
        return kinds_of_self(self._teacher)

    @property
    def kept(self) -> list[nn.Module]:
        """Weights of self-teachers that are state of this run; checkpoints must hold them."""
        kept = (found.kept for found in self_teachers(self.active))
        return [weights for weights in kept if weights is not None]

    def follow(self, steps: int) -> None:
        """Let self-teachers follow the student after an optimizer step that was not skipped.

        Args:
            steps: optimizer steps so far, without those that were skipped.
        """
        for found in self_teachers(self.active):
            found.follow(steps)

    def initial_digests(self) -> list[str]:
        """Return checksums of the initial students that a resumed run reads again.

        All ranks must call it.
        """
        digests = (found.initial_digest() for found in self_teachers(self.active))
        return [digest for digest in digests if digest is not None]

    def choose(self, fitting: bool, reference: Teacher | None) -> None:
        """Choose the models that a run uses and loads.

        Args:
            fitting: the run trains; an evaluation uses no teacher.
            reference: the initial student, if the objective reads a reference; else None.
        """
        self.active = self._teacher if fitting else None
        self.reference = reference and (self._reference or reference)

    def check(self, tokenizer: HFTokenizer, path: str, objective: Any) -> None:
        """Check the models against the student and the objective, before weights are loaded.

        Args:
            tokenizer: the student's.
            path: folder or hub name of the student.
            objective: the loss that reads their scores.

        Raises:
            ConfigurationError: a model does not fit the student, or cannot give the scores.
        """
        if self.active is not None:
            check_scores(self.active, objective)
        for model in self._models():
            model.check(tokenizer, path)
            check_end_tokens(model.other_end, objective)
            if model.aligns:
                check_sampled(objective)

    def check_device(self, device: torch.device) -> None:
        """Check that the models can run on the device, before weights are loaded.

        Raises:
            ConfigurationError: a model has a setting that cannot work there.
        """
        for model in self._models():
            model.check_device(device)

    def check_fast_paths(self) -> None:
        """Check that kernels and compiled layers score as plain ones do, on the run's device.

        Raises:
            ConfigurationError: an attention kernel fails, or gives other scores.
        """
        for model in self._models():
            model.check_fast_path()

    def load(
        self, student: Scorer, path: str, sharding: Sharding | None, device: torch.device
    ) -> None:
        """Load the models once and shard them as the student is.

        Args:
            student: the loaded student, whose weights self-teachers use.
            path: folder or hub name of the student.
            sharding: how weights are split over ranks; None: each rank holds all.
            device: where the models score.
        """
        for model in self._models():
            model.spread(sharding)
            model.look_at(student, path)
        self.move(device)

    def move(self, device: torch.device) -> None:
        """Load the models at the first call, and move them to a device."""
        self._device = device
        for model in self._models():
            model.load(device)

    def release(self) -> None:
        """Free the device memory that only scoring needs."""
        for model in self._models():
            model.release()

    def route(self, row: Row) -> int:
        """Return the index of the teacher that scores a row's completions; 0 if only one."""
        return 0 if self._teacher is None else self._teacher.route(row)

    def generation_prompt(self, row: Row, prompt_ids: list[int]) -> list[int]:
        """Return the prompt after which the teacher samples its completions of a row."""
        return (
            prompt_ids
            if self._teacher is None
            else self._teacher.generation_prompt(row, prompt_ids)
        )

    def in_student_tokens(
        self, completions: Sequence[Completion], rows: Sequence[Row], most: int
    ) -> list[Completion]:
        """Return the teacher's completions in the student's tokens; count those cut short."""
        if self._teacher is None:
            return list(completions)
        made, lost = self._teacher.in_student_tokens(completions, rows, most)
        self._lost += lost
        return made

    def take_lost(self) -> int:
        """Return how many completions ``in_student_tokens`` has cut short since the last call."""
        lost, self._lost = self._lost, 0
        return lost

    def accept(self, batch: RolloutBatch) -> None:
        """Hand a rollout to the teacher; raise ``TrainingStopped`` if it cannot score it."""
        if self._teacher is not None:
            self._teacher.accept(batch)

    def write_prompts(self, batch: RolloutBatch, groups: Sequence[Group]) -> RolloutBatch:
        """Return the batch with the teacher's own prompts, if it has any.

        Args:
            batch: this rank's completions.
            groups: their groups, in the order of the batch.
        """
        prompts = None if self.active is None else self.active.own_prompts(groups)
        if prompts is None:
            return batch
        self._dropped += sum(prompt.dropped for prompt in prompts)
        return with_prompts(batch, prompts)

    def take_dropped(self) -> int:
        """Return how many contexts were too long or could not be rendered since the last call."""
        dropped, self._dropped = self._dropped, 0
        return dropped

    def score_reference(self, batch: RolloutBatch) -> RolloutBatch:
        """Add the reference's log-probabilities; without a reference, return the batch."""
        if self.reference is None:
            return batch
        return batch.replace(ref_logprobs=self.reference.score(batch).logprobs)

    def score_teacher(
        self, batch: RolloutBatch, topk_ids: Tensor | None, top_k: int = 0
    ) -> RolloutBatch:
        """Add the teacher's scores, see ``teacher_fields``; without a teacher, return the batch.

        Args:
            batch: B completions.
            topk_ids: ``[B, T, K]``, further tokens to score at each position; None: no others.
            top_k: number of the teacher's own most likely tokens to score instead; 0: none.
        """
        if self.active is None:
            return batch
        with self._clock.running(self._device):
            if top_k:
                scores = own_top_k(self.active, batch, top_k)
            else:
                scores = self.active.score(batch, topk_ids)
        return batch.replace(
            **teacher_fields(scores),
            teacher_topk_ids=scores.topk_ids if top_k else None,
            teacher_topk_logprobs=scores.topk_logprobs,
            teacher_tail_logprobs=scores.tail_logprobs,
        )

    @torch.no_grad()
    def states(self, batch: RolloutBatch) -> Other:
        """Return the teacher's hidden states and head, for a divergence over the full vocabulary.

        The pass that computes the divergence also scores the tokens with them, unless the batch has
        the teacher's scores already.
        """
        assert self.active is not None, "a divergence has a teacher"
        with self._clock.running(self._device):
            return self.active.states(batch)._replace(scored=batch.teacher_logprobs is None)

    def _models(self) -> list[Teacher]:
        return [model for model in (self.active, self.reference) if model is not None]


def check_given(teacher: Teacher | None, objective: Any, adapters: bool) -> None:
    """Check that a configuration has the teacher that its objective needs, and that it can work.

    Args:
        teacher: the configured teacher; None: there is none.
        objective: the loss.
        adapters: the student is trained by LoRA.

    Raises:
        ConfigurationError: there is no teacher, the teacher needs a LoRA student, or its
            distribution is always the student's.
    """
    if objective.needs_teacher and teacher is None:
        raise ConfigurationError(
            f"`teacher` must be given for the objective {type(objective).__name__}: got None. "
            "Name one, e.g. `teacher: {class_path: LocalTeacher, init_args: {model: ...}}`."
        )
    if teacher is not None and teacher.needs_lora and not adapters:
        raise ConfigurationError(
            f"`teacher` must have a LoRA student to be its base: got {type(teacher).__name__} "
            "without `lora`. Set `lora: {rank: 16}`, or use a LocalTeacher."
        )
    check_self_teachers(teacher)


def check_scores(teacher: Teacher, objective: Any) -> None:
    """Check that the teacher returns the scores that the objective reads.

    Args:
        teacher: the teacher of the run.
        objective: the loss.

    Raises:
        ConfigurationError: the teacher does not give the hidden states or the entropy.
    """
    got = f"got {type(teacher).__name__}"
    if objective.divergence is not None and not teacher.gives_states:
        raise ConfigurationError(
            "`teacher` must give hidden states for a divergence over the full vocabulary: "
            f"{got}. Use a LocalTeacher, or a sampled or top-k estimator."
        )
    if objective.teacher_top_k and not teacher.gives_states:
        raise ConfigurationError(
            f"`teacher` must give hidden states to name its own most likely tokens: {got}. Use a "
            "LocalTeacher, or an objective that compares the student's."
        )
    if objective.needs_teacher_entropy and not teacher.knows_entropy:
        raise ConfigurationError(
            f"`teacher` must return its entropy for {type(objective).__name__}: {got}. Use a "
            "LocalTeacher."
        )


def initial_student(
    source: str | ModelSource, adapters: bool, double: bool, chunk_size: int | None, trunk: Trunk
) -> Teacher:
    """Return the student before training, for a reference KL.

    Args:
        source: the student's folder, hub name or model source.
        adapters: the student is trained by LoRA: its base is the reference, without a second copy.
        double: the student computes in float64, and so must the reference.
        chunk_size: tokens whose logits exist at once; None: the default of ``LocalTeacher``.
        trunk: the student's attention kernel, and whether its layers are compiled.
    """
    if adapters:
        return AdapterOffTeacher()
    return LocalTeacher(
        source,
        "float64" if double else "float32",
        chunk_size=chunk_size,
        attn_implementation=trunk.attn_implementation,
        compile=trunk.compile,
    )


def teacher_fields(scores: TokenScores | None) -> dict[str, Tensor | None]:
    """Return the batch's fields for a teacher's scores ``[B, T]`` of sampled tokens.

    Log-probabilities are floored at ``LOGPROB_FLOOR``; NaN stays, for later checks to refuse.
    """
    if scores is None:
        return {}
    best = scores.topk_ids
    return {
        "teacher_logprobs": floored(scores),
        "chunk_places": scores.chunk_places,
        "teacher_entropy": scores.entropy,
        "teacher_top_ids": None if best is None else best[..., 0],
    }


def floored(scores: TokenScores) -> Tensor:
    """Return ``[B, T]`` log-probabilities of at least ``LOGPROB_FLOOR``; sums of chunks stay.

    A teacher that sums over chunks floors the summands.
    """
    if scores.chunk_places is not None:
        return scores.logprobs
    return scores.logprobs.clamp(min=LOGPROB_FLOOR)


def old_fields(scores: TokenScores) -> dict[str, Tensor | None]:
    """Return the batch fields that a forward pass of the student fills, detached."""
    entropy = scores.entropy
    return {
        "old_logprobs": scores.logprobs.detach(),
        "old_entropy": None if entropy is None else entropy.detach(),
        "topk_ids": scores.topk_ids,
    }


def fields_found(scores: TokenScores) -> dict[str, Tensor | None]:
    """Return the batch fields that an update's passes fill, detached."""
    return {**old_fields(scores), **teacher_fields(scores.other)}
