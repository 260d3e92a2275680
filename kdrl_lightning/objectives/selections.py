"""Selections: the tokens on which the teacher is imitated, decided once per rollout."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from kdrl_lightning.errors import ConfigurationError, require_between, require_count
from kdrl_lightning.losses import aligned, beneficial, certain, wrong_completions, wrong_groups
from kdrl_lightning.losses.teacher_chunks import chunk_share, whole_chunks
from kdrl_lightning.objectives.base import Part, known, teacher_logprobs
from kdrl_lightning.rollout_batch import STUDENT, RolloutBatch


class Selection(Part):
    """A rule for the tokens on which the teacher is imitated.

    With several selections the teacher is imitated on the tokens that all of them select.

    Attributes:
        needs_advantages: the rule reads the advantages.
    """

    needs_teacher = True
    reads_old_scores = True
    needs_advantages: bool = False

    @abstractmethod
    def __call__(self, rollout: RolloutBatch) -> Tensor:
        """Return ``[B]`` or ``[B, T]`` bool, from a scored rollout with its advantages."""


class WrongCompletions(Selection):
    """Selects completions that the verifier rejects: KDRL's response mask (arXiv 2506.02208)."""

    reads_old_scores = False

    def __call__(self, rollout: RolloutBatch) -> Tensor:
        """Return ``[B]`` bool by the verdict."""
        return wrong_completions(rollout.correct)


class WrongGroups(Selection):
    """Selects completions of prompts that the student fails in all its completions.

    It is the group mask of KDRL (arXiv 2506.02208) and of HDPO (arXiv 2603.23871).
    """

    reads_old_scores = False

    def __call__(self, rollout: RolloutBatch) -> Tensor:
        """Return ``[B]`` bool by the verdicts on the student's completions of the group."""
        return wrong_groups(rollout.correct & (rollout.source == STUDENT), rollout.group_ids)


class ExceptEndToken(Selection):
    """Selects all tokens except a completion's end token.

    Use it if student and teacher end an answer with different tokens, as a base student and a chat
    teacher do. A replication of KDRL masks the end token in the teacher's term (arXiv 2609.04108).
    """

    reads_old_scores = False

    def __call__(self, rollout: RolloutBatch) -> Tensor:
        """Return ``[B, T]`` bool: False on the last token of each untruncated completion."""
        columns = torch.arange(rollout.completion_ids.shape[1], device=rollout.truncated.device)
        last = columns == (rollout.completion_lengths - 1)[:, None]
        return ~(last & ~rollout.truncated[:, None])


class ExceptFirstTokens(Selection):
    """Selects all tokens of a completion except the first ones.

    A teacher that reads a demonstration opens its answer with phrases about it. SDFT (arXiv
    2601.19897) leaves these positions out.

    Args:
        count: number of tokens to leave out, at least 0.

    Raises:
        ConfigurationError: ``count`` is negative.
    """

    reads_old_scores = False

    def __init__(self, count: int = 3) -> None:
        require_count("count", count, 0, float("inf"))
        self.count = count

    def __call__(self, rollout: RolloutBatch) -> Tensor:
        """Return ``[B, T]`` bool: False on the first ``count`` tokens."""
        columns = torch.arange(rollout.completion_ids.shape[1], device=rollout.loss_mask.device)
        return (columns >= self.count).expand_as(rollout.loss_mask)


class Gates(Selection):
    """Selects tokens by thresholds; None switches a threshold off.

    These gates are not in the RLAD paper [our choice]. All three together keep tokens on which
    student and teacher nearly agree, see ``docs/methods/rlad.md``.

    Args:
        alignment_threshold: largest ``|log pi_T - log pi_old|``, in nats.
        advantage_threshold: smallest advantage.
        exploration_entropy: largest entropy of the student, in nats.
        alignment_per: apply the alignment threshold to each ``token``, or to the mean of each
            ``completion``.

    Raises:
        ConfigurationError: a threshold is not a number, a threshold in nats is negative, or
            ``alignment_per`` is unknown.
    """

    def __init__(
        self,
        alignment_threshold: float | None = None,
        advantage_threshold: float | None = None,
        exploration_entropy: float | None = None,
        alignment_per: Literal["token", "completion"] = "token",
    ) -> None:
        for name, value in (
            ("alignment_threshold", alignment_threshold),
            ("exploration_entropy", exploration_entropy),
        ):
            if value is not None:
                require_between(name, value, 0.0, float("inf"), "Use null for no gate.")
        if advantage_threshold is not None and advantage_threshold != advantage_threshold:
            raise ConfigurationError(
                "`advantage_threshold` must be a number: got nan. Use null for no gate."
            )
        if alignment_per not in ("token", "completion"):
            raise ConfigurationError(
                f"`alignment_per` must be token or completion: got {alignment_per}. Choose one of "
                "them."
            )
        self.alignment_threshold = alignment_threshold
        self.advantage_threshold = advantage_threshold
        self.exploration_entropy = exploration_entropy
        self.alignment_per = alignment_per
        self.needs_advantages = advantage_threshold is not None
        self.reads_old_scores = (alignment_threshold, exploration_entropy) != (None, None)

    def __call__(self, rollout: RolloutBatch) -> Tensor:
        """Return ``[B, T]`` bool, from old log-probabilities, advantages and old entropy."""
        kept = rollout.loss_mask
        if self.alignment_threshold is not None:
            kept = kept & self._aligned(rollout)
        if self.advantage_threshold is not None:
            advantages = known(rollout.advantages, "advantages")
            kept = kept & beneficial(advantages, self.advantage_threshold)[:, None]
        if self.exploration_entropy is not None:
            entropy = known(rollout.old_entropy, "old_entropy")
            kept = kept & certain(entropy, self.exploration_entropy)
        return kept

    def _aligned(self, rollout: RolloutBatch) -> Tensor:
        """Compare the gap of each chunk, or a completion's mean, in which a chunk counts once."""
        old, places = known(rollout.old_logprobs, "old_logprobs"), rollout.chunk_places
        teacher = teacher_logprobs(rollout, old)
        whole = self.alignment_per == "completion"
        if whole and places is not None:
            teacher = old + chunk_share(teacher - old, places)
        mask = whole_chunks(rollout.loss_mask, places)
        return aligned(old, teacher, mask, self.alignment_threshold or 0.0, whole)
