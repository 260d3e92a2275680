"""What the module asks of a teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses.logprobs import Other, TokenScores
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import Sharding
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rollout_batch import RolloutBatch


class Teacher(ABC):
    """Scores the student's tokens. A plain object, so that no optimizer or checkpoint sees it.

    Attributes:
        generates: its weights are at hand, so that it can sample completions.
        gives_states: it can give hidden states, for divergences over the full vocabulary.
        collective: it lies over several ranks, so that all must score equally often.
        other_end: student's and teacher's end token in words, where they differ and its scores are
            not translated; set by ``check``.
        needs_lora: it is the student without its adapters.
        knows_entropy: it tells the entropy of its distributions.
        joins: it may score several micro-batches at once, prompts that they share run once.
    """

    generates: bool = False
    gives_states: bool = False
    collective: bool = False
    other_end: str | None = None
    needs_lora: bool = False
    knows_entropy: bool = True
    joins: bool = False

    @property
    def model_name(self) -> str | None:
        """Folder or hub name of its model; None if it is not in this process."""
        return None

    @property
    def vocabulary_rows(self) -> int | None:
        """Rows of its embedding: every id of a prompt must be below; None if nobody knows."""
        return None

    @abstractmethod
    def prepare(self) -> None:
        """Make or fetch what is needed; called on one process, before anything is loaded."""

    @abstractmethod
    def check(self, student_tokenizer: Any, student_path: str) -> None:
        """Raise ``ConfigurationError`` unless token ids mean the same to student and teacher."""

    def spread(self, sharding: Sharding | None) -> None:  # noqa: B027
        """Say how weights in this process are to lie over ranks, before they are loaded."""

    def check_temperature(self, temperature: float) -> None:  # noqa: B027
        """Raise ``ConfigurationError`` for a temperature that it cannot score at."""

    def look_at(self, student: Scorer, path: str) -> None:  # noqa: B027
        """Get the student, loaded from ``path``, for a teacher that is a view of it."""

    def accept(self, batch: RolloutBatch) -> None:  # noqa: B027
        """Raise ``TrainingStopped`` for completions that it cannot score, before it has to."""

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Load the weights; a second call only moves them."""

    @abstractmethod
    def score(self, batch: RolloutBatch, topk_ids: Tensor | None = None) -> TokenScores:
        """Score the sampled tokens, without gradient, at the batch's temperature.

        Args:
            batch: completions.
            topk_ids: ``[B, T, K]``, tokens whose log-probabilities are wanted as well.

        Returns:
            ``[B, T]`` scores, 0 on padding, with the teacher's own best token in ``topk_ids`` and
            its values at the given ids in ``topk_logprobs``, and of the rest in ``tail_logprobs``.
        """

    def take_part(self, batch: RolloutBatch) -> None:
        """Do a collective teacher's part where this rank has nothing for it to score."""
        self.score(batch.select([0]))

    def states(self, batch: RolloutBatch) -> Other:
        """Return hidden states and head, for a divergence over the full vocabulary.

        Raises:
            ConfigurationError: the teacher can only score tokens.
        """
        raise ConfigurationError(
            f"`teacher` must be a LocalTeacher for a divergence over the full vocabulary: got "
            f"{type(self).__name__}. Use one, or a sampled or top-k estimator."
        )

    def route(self, row: Mapping[str, Any]) -> int:
        """Return which of several teachers scores the completions of a prompt row."""
        return 0

    def fingerprint(self) -> str:
        """Return what tells its scores from another teacher's, once it is loaded."""
        weights = self.weights()
        if weights is None:
            raise ConfigurationError(
                f"`teacher` must have a fingerprint to be cached: got {type(self).__name__}, whose "
                "weights are not at hand. Cache the teachers behind it."
            )
        return weights.fingerprint()

    def weights(self) -> ModelWeights | None:
        """Return the weights if they are at hand, so that the teacher can generate."""
        return None
