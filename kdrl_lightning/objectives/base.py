"""What every objective shares: a sum of per-token terms, reduced with global denominators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from kdrl_lightning.errors import ConfigurationError, require_between
from kdrl_lightning.losses.logprobs import Divergence, TokenScores
from kdrl_lightning.losses.reduction import (
    constant_length,
    group_token_mean,
    sequence_mean,
    token_mean,
)
from kdrl_lightning.rollout_batch import RolloutBatch

Reduction = Literal["token_mean", "sequence_mean", "constant_length", "group_token_mean"]
T = TypeVar("T")

# What a schedule may set, and the range of each.
COEFFICIENTS = {
    "rl_coef": (0.0, float("inf")),
    "reward_coef": (0.0, float("inf")),
    "distill_coef": (0.0, float("inf")),
    "teacher_kl_coef": (0.0, float("inf")),
    "ref_kl_coef": (0.0, float("inf")),
    "entropy_coef": (0.0, float("inf")),
    "trrd_alpha": (0.0, 1.0),
}


def check_coefficient(name: str, value: float) -> float:
    """Return ``value`` if it lies in the coefficient's range.

    Raises:
        ConfigurationError: it does not.
    """
    low, high = COEFFICIENTS[name]
    cure = "1 is GRPO, 0 anchors at the teacher." if name == "trrd_alpha" else ""
    require_between(name, value, low, high, cure)
    return value


class Part:
    """A piece of an objective: a ratio rule, an advantage rule, a distillation term, a selection.

    Attributes:
        needs_teacher: it reads the teacher's log-probabilities.
        reads_old_scores: what it decides once per rollout follows from the student's scores then,
            or from those of a teacher.
    """

    needs_teacher: bool = False
    reads_old_scores: bool = False

    def parts(self) -> Iterator[Part]:
        """Yield this part and those that it is built from."""
        yield self
        for value in vars(self).values():
            if isinstance(value, Part):
                yield from value.parts()


@dataclass(frozen=True)
class Term:
    """One summand of an objective: ``coef * reduce(per_token)``.

    Attributes:
        name: logged as ``loss/<name>``, without the coefficient.
        per_token: ``[B, T]`` loss values.
        coef: weight in the sum.
        mask: ``[B, T]`` bool, where the term applies; None: on every loss token.
        per_masked_token: divide by the step's imitated tokens. By default a term is divided by what
            the whole step's loss tokens give, so that ``coef`` does not depend on the mask.
    """

    name: str
    per_token: Tensor
    coef: float = 1.0
    mask: Tensor | None = None
    per_masked_token: bool = False


class Objective(ABC):
    """A loss over rollouts.

    A subclass yields its terms; what must be known about a whole rollout (advantages, where to
    imitate) it computes once in ``prepare``.

    Args:
        reduction: how per-token values become one number.
        entropy_coef: weight of the entropy bonus, at least 0.

    Attributes:
        needs_teacher: a frozen teacher has to score the rollouts.
        needs_reference: the initial student has to score them as well.
        needs_groups: it compares the completions of one prompt.
        takes_teacher_completions: it has a rule for completions that the teacher sampled.
        top_k: most likely tokens of the student at which the teacher is scored.
        divergence: from the teacher, over the full vocabulary, in each update.
        leaves_out_end: what it reads of the teacher leaves out where a completion ends.
    """

    needs_teacher: bool = False
    needs_reference: bool = False
    needs_groups: bool = False
    takes_teacher_completions: bool = False
    top_k: int = 0
    divergence: Divergence | None = None
    leaves_out_end: bool = False

    def __init__(self, reduction: Reduction = "token_mean", entropy_coef: float = 0.0) -> None:
        if reduction not in get_args(Reduction):
            raise ConfigurationError(
                f"`reduction` must be one of {', '.join(get_args(Reduction))}: got {reduction}."
            )
        self.reduction = reduction
        self.entropy_coef = check_coefficient("entropy_coef", entropy_coef)

    @abstractmethod
    def terms(self, batch: RolloutBatch, scores: TokenScores) -> Iterator[Term]:
        """Yield the summands for one micro-batch."""

    def prepare(self, rollout: RolloutBatch) -> RolloutBatch:
        """Add to a scored rollout what the terms need; whole groups are present."""
        return rollout.replace(imitation_mask=rollout.loss_mask)

    def reads_old_scores(self, rollout: RolloutBatch) -> bool:
        """Whether ``prepare`` reads the student's scores of such a rollout.

        Where it does not, the student is not run for them: at the first update they are those of
        that update's own forward pass, and the terms find them in the batch all the same.
        """
        return True

    def reads_teacher_scores(self, rollout: RolloutBatch) -> bool:
        """Whether ``prepare`` reads the teacher's scores of such a rollout.

        Where it does not, a teacher that a ``divergence`` runs in the updates is not run before.
        """
        return True

    def log_ratio(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """``[B, T]`` log of the ratio that the surrogate clips; log rho unless overridden."""
        return logprobs - known(batch.old_logprobs, "old_logprobs")

    def outside(self, batch: RolloutBatch, logprobs: Tensor) -> tuple[Tensor, Tensor] | None:
        """``[B, T]`` bool each: that ratio lies below, above its clip range; None without one."""
        return None

    def token_advantages(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """``[B, T]`` advantage that multiplies the ratio; 0 without one."""
        return torch.zeros_like(logprobs)

    def dead(self, batch: RolloutBatch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """``[B, T]`` bool: tokens whose policy gradient the clip removes."""
        return torch.zeros_like(batch.loss_mask)

    def imitated(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """``[B, T]`` bool: tokens on which the teacher enters the gradient; none here."""
        return torch.zeros_like(batch.loss_mask)

    def parts(self) -> Iterator[Any]:
        """Yield this object and the parts that it is built from."""
        yield self
        for value in vars(self).values():
            if isinstance(value, Part):
                yield from value.parts()

    def coefficient(self, name: str) -> float:
        """Return a coefficient of this objective or of its parts.

        Raises:
            ConfigurationError: it has none of that name.
        """
        return float(getattr(self._owner(name), name))

    def set_coefficient(self, name: str, value: float) -> None:
        """Set a coefficient, in its range."""
        setattr(self._owner(name), name, check_coefficient(name, value))

    def _owner(self, name: str) -> Any:
        parts = list(self.parts())
        owners = [part for part in parts if name in COEFFICIENTS and hasattr(part, name)]
        if len(owners) == 1:
            return owners[0]
        if owners:
            found = " and ".join(type(part).__name__ for part in owners)
            raise ConfigurationError(
                f"`coefficient` must belong to one part: got {name}, which {found} have."
            )
        known_names = [c for c in COEFFICIENTS if any(hasattr(part, c) for part in parts)]
        raise ConfigurationError(
            f"`coefficient` must be one of {type(self).__name__}'s ({', '.join(known_names)}): "
            f"got {name}."
        )

    def __call__(
        self, batch: RolloutBatch, scores: TokenScores
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this micro-batch's share of the step's loss, and of each term."""
        batch, scores = blank(batch, scores)
        terms = list(self.terms(batch, scores))
        if self.entropy_coef:
            terms.append(Term("entropy", -known(scores.entropy, "entropy"), self.entropy_coef))
        names = [term.name for term in terms]
        if len(set(names)) < len(names) or "total" in names:
            raise ConfigurationError(
                f"terms of an objective must have names of their own, and none is `total`: got "
                f"{', '.join(names)}."
            )
        shares = {term.name: self._reduce(term, batch) for term in terms}
        loss = torch.stack([term.coef * shares[term.name] for term in terms]).sum()
        return loss, {name: share.detach() for name, share in shares.items()}

    def _reduce(self, term: Term, batch: RolloutBatch) -> Tensor:
        totals = known(batch.totals, "totals")
        mask = batch.loss_mask if term.mask is None else batch.loss_mask & term.mask
        if term.per_masked_token:
            return token_mean(term.per_token, mask, totals.num_imitated_tokens)
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
            case _:
                return group_token_mean(
                    term.per_token, mask, batch.group_tokens, totals.num_prompts
                )


def blank(batch: RolloutBatch, scores: TokenScores) -> tuple[RolloutBatch, TokenScores]:
    """Set every score outside the loss to 0: an inf there cannot reach a gradient."""
    out = ~batch.loss_mask

    def zero(value: Tensor) -> Tensor:
        return value.masked_fill(out.unsqueeze(-1) if value.dim() == 3 else out, 0)

    names = (
        "old_logprobs",
        "rollout_logprobs",
        "teacher_logprobs",
        "teacher_topk_logprobs",
        "teacher_tail_logprobs",
        "ref_logprobs",
        "importance_weights",
    )
    fields = {n: zero(value) for n in names if (value := getattr(batch, n)) is not None}
    return batch.replace(**fields), scores.map(zero)


def known(value: T | None, name: str) -> T:
    """Return a field that scoring must have filled; raise where it is missing."""
    if value is None:
        raise ConfigurationError(
            f"`{name}` must be present in the rollout batch: got None. "
            "Score the rollout first; teacher scores need a teacher, and what `prepare` reads of "
            "student or teacher must be declared by `reads_old_scores`."
        )
    return value
