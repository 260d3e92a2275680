"""What every objective shares: a sum of per-token terms, reduced with global denominators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from kdrl_lightning.errors import ConfigurationError, require_between
from kdrl_lightning.losses.reduction import (
    constant_length,
    group_token_mean,
    sequence_mean,
    token_mean,
)
from kdrl_lightning.rollout_batch import RolloutBatch

Reduction = Literal["token_mean", "sequence_mean", "constant_length", "group_token_mean"]
T = TypeVar("T")


class TokenScores(NamedTuple):
    """The student's forward pass: ``logprobs [B, T]`` and ``entropy [B, T]``, with gradient."""

    logprobs: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class Term:
    """One summand of an objective: ``coef * reduce(per_token)``.

    Attributes:
        name: logged as ``loss/<name>``, without the coefficient.
        per_token: ``[B, T]`` loss values.
        coef: weight in the sum.
        mask: ``[B, T]`` bool, where the term applies; None: on every loss token. The denominator
            counts all loss tokens either way, so that ``coef`` keeps its meaning.
    """

    name: str
    per_token: Tensor
    coef: float = 1.0
    mask: Tensor | None = None


class Objective(ABC):
    """A loss over rollouts.

    A subclass yields its terms; what must be known about a whole rollout (advantages, where to
    imitate) it computes once in ``prepare``. Coefficients are plain attributes, so that a schedule
    can set them.

    Args:
        reduction: how per-token values become one number.
        entropy_coef: weight of the entropy bonus, at least 0.
    """

    needs_teacher: ClassVar[bool] = False
    needs_groups: ClassVar[bool] = False

    def __init__(self, reduction: Reduction = "token_mean", entropy_coef: float = 0.0) -> None:
        require_between("entropy_coef", entropy_coef, 0.0, float("inf"))
        self.reduction = reduction
        self.entropy_coef = entropy_coef

    @abstractmethod
    def terms(self, batch: RolloutBatch, scores: TokenScores) -> Iterator[Term]:
        """Yield the summands for one micro-batch."""

    def prepare(self, rollout: RolloutBatch) -> RolloutBatch:
        """Add to a scored rollout what the terms need; whole groups are present."""
        return rollout.replace(imitation_mask=rollout.loss_mask)

    def log_ratio(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """``[B, T]`` log of the ratio that the surrogate clips; log rho unless overridden."""
        return logprobs - known(batch.old_logprobs, "old_logprobs")

    def imitated(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """``[B, T]`` bool: tokens on which the teacher enters the gradient; none here."""
        return torch.zeros_like(batch.loss_mask)

    def __call__(
        self, batch: RolloutBatch, scores: TokenScores
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this micro-batch's share of the step's loss, and of each term."""
        batch, scores = _blank(batch, scores)
        terms = list(self.terms(batch, scores))
        if self.entropy_coef:
            terms.append(Term("entropy", -scores.entropy, self.entropy_coef))
        shares = {term.name: self._reduce(term, batch) for term in terms}
        loss = torch.stack([term.coef * shares[term.name] for term in terms]).sum()
        return loss, {name: share.detach() for name, share in shares.items()}

    def _reduce(self, term: Term, batch: RolloutBatch) -> Tensor:
        totals = known(batch.totals, "totals")
        mask = batch.loss_mask if term.mask is None else batch.loss_mask & term.mask
        match self.reduction:
            case "token_mean":
                return token_mean(term.per_token, mask, totals.num_loss_tokens)
            case "sequence_mean":
                # Divide by the completion's loss tokens, not by the term's own.
                weights = batch.loss_mask.sum(1, keepdim=True).clamp(min=1)
                spread = term.per_token * mask.sum(1, keepdim=True) / weights
                return sequence_mean(spread, mask, totals.num_completions)
            case "constant_length":
                return constant_length(
                    term.per_token, mask, totals.num_completions, totals.max_tokens
                )
            case "group_token_mean":
                return group_token_mean(
                    term.per_token, mask, batch.group_tokens, totals.num_prompts
                )
            case _:
                raise ConfigurationError(
                    "`reduction` must be token_mean, sequence_mean, constant_length or "
                    f"group_token_mean: got {self.reduction}."
                )


def _blank(batch: RolloutBatch, scores: TokenScores) -> tuple[RolloutBatch, TokenScores]:
    """Set every log-probability outside the loss to 0: an inf there cannot reach a gradient."""
    out = ~batch.loss_mask
    fields = {
        name: value.masked_fill(out, 0.0)
        for name in ("old_logprobs", "teacher_logprobs")
        if (value := getattr(batch, name)) is not None
    }
    return batch.replace(**fields), TokenScores(*(s.masked_fill(out, 0.0) for s in scores))


def known(value: T | None, name: str) -> T:
    """Return a field that scoring must have filled; raise where it is missing."""
    if value is None:
        raise ConfigurationError(
            f"`{name}` must be present in the rollout batch: got None. "
            "Score the rollout first; teacher scores need a teacher."
        )
    return value
