"""The base class of all teachers: what a run needs from one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdrl_lightning.common.untyped import HFTokenizer, Row
from kdrl_lightning.engines.base import Completion
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses.logprobs import Other, TokenScores
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import Sharding
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rollout_batch import RolloutBatch
from kdrl_lightning.teachers.own_prompt.contexts import Context
from kdrl_lightning.teachers.own_prompt.groups import Group, OwnPrompt

# `Any`: transformers has no type that all tokenizers share, and users decide the columns of a
# row.


class OwnVocabulary(NamedTuple):
    """What an engine must know of a teacher's tokenizer that is not the student's.

    Attributes:
        ends: the end tokens.
        size: number of token ids; all ids are below it.
    """

    ends: tuple[int, ...]
    size: int


class Teacher(ABC):
    """Base class of teachers: scores completions with a frozen model.

    A teacher is a plain object, not a submodule, so that optimizers and checkpoints do not see it.

    Attributes:
        generates: the weights are in this process, so an engine can sample from them.
        moves: these weights follow the student's, so an engine needs them for every rollout.
        gives_states: ``states`` works; divergences over the full vocabulary need it.
        collective: ranks score together, so all of them must call ``score`` equally often.
        other_end: the end tokens of student and teacher, in words, if they differ and the teacher
            does not translate them; else None. ``check`` sets it.
        needs_lora: the teacher is the student without its adapters.
        knows_entropy: ``score`` returns the entropy of the teacher's distributions.
        aligns: the teacher has another tokenizer, so it scores only chunks of sampled tokens;
            ``check`` sets it.
        joins: one call may score several micro-batches, so a prompt that they share runs once.
        has_own_prompt: the teacher reads completions after other prompts than the student's.
    """

    generates: bool = False
    moves: bool = False
    gives_states: bool = False
    collective: bool = False
    other_end: str | None = None
    needs_lora: bool = False
    knows_entropy: bool = True
    joins: bool = False
    aligns: bool = False
    has_own_prompt: bool = False

    @property
    def model_name(self) -> str | None:
        """Folder or hub name of the teacher's model; None if it is not in this process."""
        return None

    @property
    def tokenizer_path(self) -> str | None:
        """Folder or hub name of the teacher's tokenizer; None if it is the student's."""
        return self.model_name

    @property
    def vocabulary_rows(self) -> int | None:
        """Rows of the teacher's embedding, which ids must stay below; None if unknown."""
        return None

    @property
    def context_length(self) -> int | None:
        """Maximum length of prompt plus completion, in tokens; None if unknown."""
        return None

    @property
    def contexts(self) -> Sequence[Context]:
        """What the teacher reads besides the student's prompt."""
        return ()

    def own_prompts(self, groups: Sequence[Group]) -> list[OwnPrompt] | None:
        """Return the prompt after which the teacher reads each completion; None: the student's.

        Args:
            groups: this rank's completions with their rewards, in the order of the batch.
        """
        return None

    def lengths(self, batch: RolloutBatch) -> Tensor:
        """Return how many tokens of prompt and completion the teacher reads, ``[B]`` int64.

        Args:
            batch: B completions, as ``score`` gets them.
        """
        prompts = batch.teacher_prompt_ids
        if prompts is None:
            return batch.lengths
        return (prompts >= 0).sum(1) + batch.completion_lengths

    def check_row(self, row: Row, tokenizer: HFTokenizer) -> None:  # noqa: B027
        """Raise ``ConfigurationError`` if the teacher's prompt of a row cannot be written.

        Args:
            row: a row of the training prompts.
            tokenizer: the student's; a ``CrossTokenizerTeacher`` passes on the teacher's.
        """

    def check_rows(self, rows: Sequence[Row], tokenizer: HFTokenizer) -> str:
        """Check the contexts of training rows before the run.

        Args:
            rows: the checked rows of the training prompts.
            tokenizer: as for ``check_row``.

        Returns:
            A line that says how many rows have no context; empty if all have one.

        Raises:
            ConfigurationError: no row has a context that the teacher can use.
        """
        return ""

    @abstractmethod
    def prepare(self) -> None:
        """Make or download the model; one process calls it before anything is loaded."""

    @abstractmethod
    def check(self, student_tokenizer: HFTokenizer, student_path: str) -> None:
        """Compare the tokenizers of student and teacher.

        Args:
            student_tokenizer: the student's tokenizer.
            student_path: folder or hub name of the student, for messages.

        Raises:
            ConfigurationError: a token id has different meanings for them.
        """

    def spread(self, sharding: Sharding | None) -> None:  # noqa: B027
        """Set how ``load`` splits the weights over ranks; None: every rank holds all."""

    def check_temperature(self, temperature: float) -> None:  # noqa: B027
        """Raise ``ConfigurationError`` if the teacher cannot score at this temperature."""

    def check_device(self, device: torch.device) -> None:  # noqa: B027
        """Raise ``ConfigurationError`` if a setting cannot work on the device of the run."""

    def check_fast_path(self) -> None:  # noqa: B027
        """Check that attention kernel and compiled layers score as plain ones do on the device."""

    def look_at(self, student: Scorer, path: str) -> None:  # noqa: B027
        """Receive the student, loaded from ``path``; only teachers that use its weights need it."""

    def accept(self, batch: RolloutBatch) -> None:  # noqa: B027
        """Receive completions to score later; raise ``TrainingStopped`` if that is impossible."""

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Load the weights; a second call only moves them."""

    def release(self) -> None:  # noqa: B027
        """Free the device memory that only scoring needs; the next ``score`` allocates it again."""

    @abstractmethod
    def score(self, batch: RolloutBatch, topk_ids: Tensor | None = None) -> TokenScores:
        """Return log-probabilities of the sampled tokens, at the batch's temperature.

        No gradient is kept.

        Args:
            batch: B completions of at most T tokens.
            topk_ids: ``[B, T, K]``, further token ids to score at each position; None: no others.

        Returns:
            ``logprobs`` ``[B, T]`` in nats, 0 on padding; the teacher's most likely token in
            ``topk_ids``. With the argument ``topk_ids``: the log-probabilities of those ids in
            ``topk_logprobs`` and, except from a server, of all others together in
            ``tail_logprobs``.
        """

    def take_part(self, batch: RolloutBatch) -> None:
        """Join the collectives of a collective teacher if this rank has nothing to score."""
        self.score(batch.select([0]))

    def states(self, batch: RolloutBatch) -> Other:
        """Return hidden states and head, from which a loss computes full-vocabulary divergences.

        Raises:
            ConfigurationError: the teacher can only score tokens.
        """
        raise ConfigurationError(
            f"`teacher` must give hidden states for a divergence over the full vocabulary: got "
            f"{type(self).__name__}. Use a LocalTeacher, or a sampled or top-k estimator."
        )

    def route(self, row: Mapping[str, Any]) -> int:
        """Return the index of the teacher that scores a prompt row's completions; 0 if only one."""
        return 0

    def fingerprint(self) -> str:
        """Return a text that differs for teachers with different scores; call it after ``load``.

        Raises:
            ConfigurationError: the weights are not in this process.
        """
        weights = self.weights()
        if weights is None:
            raise ConfigurationError(
                f"`teacher` must have weights in this process to be cached: got "
                f"{type(self).__name__}. Wrap each of its teachers in a CachedTeacher instead."
            )
        return weights.fingerprint()

    def generation_prompt(self, row: Row, prompt_ids: list[int]) -> list[int]:
        """Return the prompt after which the teacher's completions of a row are sampled.

        Args:
            row: the prompt's row.
            prompt_ids: the student's prompt, which this method returns by default.
        """
        return prompt_ids

    def in_student_tokens(
        self, completions: Sequence[Completion], rows: Sequence[Row], most: int
    ) -> tuple[list[Completion], int]:
        """Return completions that this teacher sampled, in the student's tokens.

        Args:
            completions: in the teacher's tokens.
            rows: the prompt row of each completion.
            most: maximum number of tokens of a completion.

        Returns:
            The completions, and how many of them are cut short: they need more than ``most`` of the
            student's tokens, or text that these cannot write.
        """
        return list(completions), 0

    @property
    def own_vocabulary(self) -> OwnVocabulary | None:
        """End tokens and number of ids of the teacher's tokenizer; None if it is the student's."""
        return None

    def sampling_weights(self) -> ModelWeights | None:
        """Return the weights with which an engine samples the teacher's completions to train on."""
        return self.weights()

    def weights(self) -> ModelWeights | None:
        """Return the weights with which an engine evaluates the teacher; None if it cannot."""
        return None
