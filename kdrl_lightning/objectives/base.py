"""The base of all objectives: a sum of per-token terms, reduced with global denominators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from kdrl_lightning.errors import ConfigurationError, require_between
from kdrl_lightning.losses.head.chunk_math import Divergence
from kdrl_lightning.losses.logprobs import TokenScores
from kdrl_lightning.losses.reduction import (
    constant_length,
    group_token_mean,
    sequence_mean,
    token_mean,
)
from kdrl_lightning.losses.teacher_chunks import teacher_beside, whole_chunks
from kdrl_lightning.rollout_batch import RolloutBatch

Reduction = Literal["token_mean", "sequence_mean", "constant_length", "group_token_mean"]
T = TypeVar("T")

# The coefficients that a schedule may set, each with its range.
COEFFICIENTS = {
    "rl_coef": (0.0, float("inf")),
    "reward_coef": (0.0, float("inf")),
    "distill_coef": (0.0, float("inf")),
    "teacher_kl_coef": (0.0, float("inf")),
    "ref_kl_coef": (0.0, float("inf")),
    "entropy_coef": (0.0, float("inf")),
    "trrd_alpha": (0.0, 1.0),
    "mix": (0.0, 1.0),
}


def check_coefficient(name: str, value: float) -> float:
    """Return ``value`` if it lies in the coefficient's range.

    Args:
        name: one of ``COEFFICIENTS``.
        value: the value to check.

    Raises:
        ConfigurationError: the value lies outside the range.
    """
    low, high = COEFFICIENTS[name]
    cure = "1 is GRPO, 0 anchors at the teacher." if name == "trrd_alpha" else ""
    require_between(name, value, low, high, cure)
    return value


class Part:
    """A part of an objective: a ratio rule, an advantage rule, a distillation term, a selection.

    Attributes:
        needs_teacher: the part reads the teacher's log-probabilities.
        reads_old_scores: the part reads the student's or the teacher's scores when a rollout is
            prepared.
        couples_tokens: the derivative of a token's loss depends on the scores of other tokens, as
            with a ratio of whole completions.
        needs_reference: the part reads ``ref_logprobs``.
        needs_teacher_entropy: the part reads ``teacher_entropy``.
    """

    needs_teacher: bool = False
    needs_reference: bool = False
    needs_teacher_entropy: bool = False
    reads_old_scores: bool = False
    couples_tokens: bool = False

    def parts(self) -> Iterator[Part]:
        """Yield this part and all parts in it."""
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
        mask: ``[B, T]`` bool: True on the tokens of the term; None: every loss token.
        per_masked_token: divide by the step's imitated tokens, whatever the reduction. By default
            the reduction counts all loss tokens, so that the meaning of ``coef`` does not depend on
            the mask.
    """

    name: str
    per_token: Tensor
    coef: float = 1.0
    mask: Tensor | None = None
    per_masked_token: bool = False


class Objective(ABC):
    """Base class of all losses over rollouts.

    A subclass yields its terms in ``terms``. In ``prepare`` it computes what it needs once for a
    whole rollout: advantages, and the tokens to imitate.

    Args:
        reduction: how per-token values become one number, see ``losses/reduction.py``.
        entropy_coef: weight of the entropy bonus, at least 0.

    Attributes:
        needs_teacher: a frozen teacher must score the rollouts.
        needs_reference: the reference, by default the initial student, must score them too.
        needs_groups: the objective compares the completions of one prompt.
        takes_teacher_completions: the objective has a rule for completions that the teacher
            sampled.
        asks_for_failed: the teacher samples only for prompts for which no completion of the student
            is correct.
        top_k: number of the student's most likely tokens that the teacher scores; 0: none.
        teacher_top_k: number of the teacher's most likely tokens that both models score; 0: none.
        divergence: full-vocabulary divergence from the teacher, computed in each update; None
            without one.
        leaves_out_end: no term uses the teacher's score of a completion's end token.

    Raises:
        ConfigurationError: ``reduction`` is unknown, or ``entropy_coef`` is out of range.
    """

    needs_teacher: bool = False
    needs_reference: bool = False
    needs_groups: bool = False
    takes_teacher_completions: bool = False
    asks_for_failed: bool = False
    top_k: int = 0
    teacher_top_k: int = 0
    divergence: Divergence | None = None
    leaves_out_end: bool = False

    def __init__(self, reduction: Reduction = "token_mean", entropy_coef: float = 0.0) -> None:
        if reduction not in get_args(Reduction):
            raise ConfigurationError(
                f"`reduction` must be one of {', '.join(get_args(Reduction))}: got {reduction}. "
                "token_mean is the default."
            )
        self.reduction = reduction
        self.entropy_coef = check_coefficient("entropy_coef", entropy_coef)

    @property
    def couples_tokens(self) -> bool:
        """Whether the derivative of a token's loss depends on the scores of other tokens.

        If not, the head's gradients are computed in the forward pass, which is faster. By default
        it is True if it is for any part. A wrong answer costs time, but changes no gradient.
        """
        return any(part.couples_tokens for part in self.parts() if part is not self)

    @property
    def needs_teacher_entropy(self) -> bool:
        """Whether a part reads the entropy of the teacher's distributions."""
        return any(part.needs_teacher_entropy for part in self.parts() if part is not self)

    @abstractmethod
    def terms(self, batch: RolloutBatch, scores: TokenScores) -> Iterator[Term]:
        """Yield the terms of one micro-batch.

        Args:
            batch: B completions, scored and prepared.
            scores: the student's scores ``[B, T]`` of the current forward pass, with gradient.
        """

    def prepare(self, rollout: RolloutBatch) -> RolloutBatch:
        """Return a scored rollout of whole groups with what ``terms`` needs for all its updates."""
        mask = whole_chunks(rollout.taught_mask, rollout.chunk_places)
        return rollout.replace(imitation_mask=mask)

    def reads_old_scores(self, rollout: RolloutBatch) -> bool:
        """Return whether ``prepare`` reads the student's scores of this rollout.

        If not, we skip the separate scoring pass: the first update's forward pass gives the scores,
        and ``terms`` finds them in the batch as usual.
        """
        return True

    def reads_teacher_scores(self, rollout: RolloutBatch) -> bool:
        """Return whether ``prepare`` reads the teacher's scores of this rollout.

        If not, a teacher with a full-vocabulary ``divergence`` runs only during updates.
        """
        return True

    def compared_ids(self, batch: RolloutBatch) -> Tensor | None:
        """Return the ``[B, T, K]`` ids whose probabilities are compared; None without a top-k.

        They are the teacher's most likely tokens, or the student's at rollout time.
        """
        if self.teacher_top_k:
            return batch.teacher_topk_ids
        return batch.topk_ids if self.top_k else None

    def log_ratio(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return the ``[B, T]`` log of the ratio that the surrogate clips; log rho by default."""
        return logprobs - known(batch.old_logprobs, "old_logprobs")

    def outside(self, batch: RolloutBatch, logprobs: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return two ``[B, T]`` masks: ratio below and above its clip range; None: no clip."""
        return None

    def token_advantages(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return the ``[B, T]`` advantages that multiply the ratio; 0 without an advantage rule."""
        return torch.zeros_like(logprobs)

    def dead(self, batch: RolloutBatch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Return ``[B, T]`` bool: the clip removes the token's policy gradient."""
        return torch.zeros_like(batch.loss_mask)

    def imitated(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return ``[B, T]`` bool: the teacher enters the token's gradient; False by default."""
        return torch.zeros_like(batch.loss_mask)

    def parts(self) -> Iterator[Objective | Part]:
        """Yield this objective and all parts in it."""
        yield self
        for value in vars(self).values():
            if isinstance(value, Part):
                yield from value.parts()

    def coefficient(self, name: str) -> float:
        """Return a coefficient of this objective or of its parts.

        Raises:
            ConfigurationError: no part has a coefficient of that name, or several have.
        """
        return float(getattr(self._owner(name), name))

    def set_coefficient(self, name: str, value: float) -> None:
        """Set a coefficient of this objective or of its parts.

        Raises:
            ConfigurationError: no part has it, several have it, or the value is out of range.
        """
        setattr(self._owner(name), name, check_coefficient(name, value))

    def _owner(self, name: str) -> Objective | Part:
        parts = list(self.parts())
        owners = [part for part in parts if name in COEFFICIENTS and hasattr(part, name)]
        if len(owners) == 1:
            return owners[0]
        if owners:
            found = " and ".join(type(part).__name__ for part in owners)
            raise ConfigurationError(
                f"`coefficient` must belong to one part: got {name}, which {found} have. Keep it "
                "in one of them."
            )
        known_names = [c for c in COEFFICIENTS if any(hasattr(part, c) for part in parts)]
        raise ConfigurationError(
            f"`coefficient` must be one of {type(self).__name__}'s ({', '.join(known_names)}): "
            f"got {name}. Name one of these, or add a part that has it."
        )

    def __call__(
        self, batch: RolloutBatch, scores: TokenScores
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this micro-batch's share of the step's loss, and the share of each term.

        Args:
            batch: B completions, scored and prepared, with the step's ``totals``.
            scores: the student's scores ``[B, T]`` of the current forward pass, with gradient.

        Returns:
            The scalar share of the loss, with gradient, and each term's share by name, detached and
            without its coefficient.

        Raises:
            ConfigurationError: two terms have one name, or the batch lacks a field.
        """
        batch, scores = blank(batch, scores)
        terms = list(self.terms(batch, scores))
        if self.entropy_coef:
            terms.append(Term("entropy", -known(scores.entropy, "entropy"), self.entropy_coef))
        names = [term.name for term in terms]
        if len(set(names)) < len(names) or "total" in names:
            raise ConfigurationError(
                f"`terms` must have different names, none of them `total`: got {', '.join(names)}. "
                "Rename a term."
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
                # Divide by the completion's loss tokens, not by the tokens of the term.
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
    """Return batch and scores with 0 outside the loss, so that an inf there reaches no gradient."""
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
        "imitation_weights",
    )
    fields = {n: zero(value) for n in names if (value := getattr(batch, n)) is not None}
    return batch.replace(**fields), scores.map(zero)


def teacher_logprobs(batch: RolloutBatch, logprobs: Tensor) -> Tensor:
    """Return the teacher's log-probabilities to compare with ``logprobs`` of the student.

    Every method that compares sampled tokens reads them here. If the teacher has another tokenizer,
    the distance to ``logprobs`` is that of the token's whole chunk, see ``teacher_beside``.

    Args:
        batch: completions that the teacher has scored.
        logprobs: ``[B, T]``, the student's, current or old.

    Returns:
        ``[B, T]`` nats, without gradient.

    Raises:
        ConfigurationError: the teacher has not scored them.
    """
    teacher = known(batch.teacher_logprobs, "teacher_logprobs")
    return teacher_beside(teacher, logprobs, batch.chunk_places)


def known(value: T | None, name: str) -> T:
    """Return a batch field that scoring must have filled.

    Raises:
        ConfigurationError: the field is None.
    """
    if value is None:
        raise ConfigurationError(
            f"`{name}` must be present in the rollout batch: got None. Score the rollout first; "
            "the teacher's scores need a `teacher`. If your objective reads scores in `prepare`, "
            "declare it with `reads_old_scores`."
        )
    return value
