"""Selections: where the teacher is imitated. Each is decided once per rollout."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from kdrl_lightning.errors import ConfigurationError, require_between
from kdrl_lightning.losses import aligned, beneficial, certain, wrong_completions, wrong_groups
from kdrl_lightning.objectives.base import Part, known
from kdrl_lightning.rollout_batch import STUDENT, RolloutBatch


class Selection(Part):
    """Tokens on which the teacher is imitated; several selections intersect.

    Attributes:
        needs_advantages: it reads the advantages.
    """

    needs_teacher = True
    reads_old_scores = True
    needs_advantages: bool = False

    @abstractmethod
    def __call__(self, rollout: RolloutBatch) -> Tensor:
        """``[B]`` or ``[B, T]`` bool, from a scored rollout with its advantages."""


class WrongCompletions(Selection):
    """Completions that the verifier rejects: KDRL's response-level mask (arXiv 2506.02208)."""

    reads_old_scores = False

    def __call__(self, rollout: RolloutBatch) -> Tensor:
        """Select by the verdict."""
        return wrong_completions(rollout.correct)


class WrongGroups(Selection):
    """Completions of prompts that the student never solves: KDRL's group-level mask, and HDPO's."""

    reads_old_scores = False

    def __call__(self, rollout: RolloutBatch) -> Tensor:
        """Select by the verdicts on the student's completions of the group."""
        return wrong_groups(rollout.correct & (rollout.source == STUDENT), rollout.group_ids)


class ExceptEndToken(Selection):
    """All but the final end token, where student and teacher end in different ways.

    A replication of KDRL masks it in the teacher's term (arXiv 2609.04108): a base student and a
    chat teacher close their answers differently.
    """

    reads_old_scores = False

    def __call__(self, rollout: RolloutBatch) -> Tensor:
        """Leave out the last token of each completion that was not cut."""
        columns = torch.arange(rollout.completion_ids.shape[1], device=rollout.truncated.device)
        last = columns == (rollout.completion_lengths - 1)[:, None]
        return ~(last & ~rollout.truncated[:, None])


class Gates(Selection):
    """Selective imitation by thresholds; each gate is off at None.

    A description of RLAD other than the paper's. All three together keep tokens where the teacher
    has little to say (d near 0): see the method's page.

    Args:
        alignment_threshold: largest ``|log pi_T - log pi_old|``, nats.
        advantage_threshold: smallest advantage.
        exploration_entropy: largest entropy of the student, nats.
        alignment_per: judge alignment by ``token`` or by the ``completion``'s mean.
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
            raise ConfigurationError("`advantage_threshold` must be a number: got nan.")
        if alignment_per not in ("token", "completion"):
            raise ConfigurationError(
                f"`alignment_per` must be token or completion: got {alignment_per}."
            )
        self.alignment_threshold = alignment_threshold
        self.advantage_threshold = advantage_threshold
        self.exploration_entropy = exploration_entropy
        self.alignment_per = alignment_per
        self.needs_advantages = advantage_threshold is not None
        self.reads_old_scores = (alignment_threshold, exploration_entropy) != (None, None)

    def __call__(self, rollout: RolloutBatch) -> Tensor:
        """Select by old log-probabilities, advantages and old entropy."""
        kept = rollout.loss_mask
        if self.alignment_threshold is not None:
            kept = kept & aligned(
                known(rollout.old_logprobs, "old_logprobs"),
                known(rollout.teacher_logprobs, "teacher_logprobs"),
                rollout.loss_mask,
                self.alignment_threshold,
                self.alignment_per == "completion",
            )
        if self.advantage_threshold is not None:
            advantages = known(rollout.advantages, "advantages")
            kept = kept & beneficial(advantages, self.advantage_threshold)[:, None]
        if self.exploration_entropy is not None:
            entropy = known(rollout.old_entropy, "old_entropy")
            kept = kept & certain(entropy, self.exploration_entropy)
        return kept
