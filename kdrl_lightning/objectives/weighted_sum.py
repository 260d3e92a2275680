"""Two objectives in one loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses import TokenScores
from kdrl_lightning.objectives.base import Objective, Reduction, Term, check_coefficient
from kdrl_lightning.objectives.policy import PolicyObjective
from kdrl_lightning.rollout_batch import RolloutBatch


class WeightedSum(Objective):
    """``rl_coef * rl + distill_coef * distill``, e.g. TRRD as a term beside GRPO.

    Advantages come from ``rl``, where to imitate from ``distill``; the reductions and entropy
    weights of the two are replaced by this object's.

    Args:
        rl: the policy objective.
        distill: the objective with the teacher.
        rl_coef: weight of the first, at least 0.
        distill_coef: weight of the second, at least 0.
        reduction: how per-token values become one number.
        entropy_coef: weight of the entropy bonus.
    """

    def __init__(
        self,
        rl: PolicyObjective,
        distill: PolicyObjective,
        rl_coef: float = 1.0,
        distill_coef: float = 1.0,
        reduction: Reduction = "token_mean",
        entropy_coef: float = 0.0,
    ) -> None:
        super().__init__(reduction, entropy_coef)
        if rl.needs_teacher:
            raise ConfigurationError(
                f"`rl` must be an objective without a teacher: got {type(rl).__name__}. "
                "Give that one as `distill`."
            )
        if distill.engine_correction is not None:
            raise ConfigurationError(
                "`engine_correction` must be given to `rl`, for both: got one in `distill`."
            )
        theirs = distill.advantage
        if theirs is not None and theirs.needs_groups and not theirs.same_scores(rl.advantage):
            raise ConfigurationError(
                f"`distill` must take its advantages as `rl` does, for they are shared: got "
                f"{type(theirs).__name__} with scale_by_std {theirs.scale_by_std}."
            )
        self.rl = rl
        self.distill = distill
        self.rl_coef = check_coefficient("rl_coef", rl_coef)
        self.distill_coef = check_coefficient("distill_coef", distill_coef)
        self.needs_teacher = distill.needs_teacher
        self.leaves_out_end = distill.leaves_out_end
        self.needs_reference = rl.needs_reference or distill.needs_reference
        self.needs_groups = rl.needs_groups or distill.needs_groups
        self.takes_teacher_completions = all(o.takes_teacher_completions for o in (rl, distill))
        self.top_k, self.divergence = distill.top_k, distill.divergence

    def parts(self) -> Iterator[Any]:
        """Add the parts of the two; their own weights first."""
        yield from (p for o in (self.rl, self.distill) for p in o.parts() if p is not o)
        yield self

    def prepare(self, rollout: RolloutBatch) -> RolloutBatch:
        """Let each decide its part."""
        rl = self.rl.prepare(rollout)
        return self.distill.prepare(rollout).replace(
            advantages=rl.advantages, importance_weights=rl.importance_weights
        )

    def reads_old_scores(self, rollout: RolloutBatch) -> bool:
        """Ask both."""
        return self.rl.reads_old_scores(rollout) or self.distill.reads_old_scores(rollout)

    def reads_teacher_scores(self, rollout: RolloutBatch) -> bool:
        """Ask both."""
        return self.rl.reads_teacher_scores(rollout) or self.distill.reads_teacher_scores(rollout)

    def terms(self, batch: RolloutBatch, scores: TokenScores) -> Iterator[Term]:
        """Yield the terms of both, named apart."""
        for prefix, objective, weight in (
            ("rl", self.rl, self.rl_coef),
            ("distill", self.distill, self.distill_coef),
        ):
            for term in objective.terms(batch, scores):
                yield replace(term, name=f"{prefix}_{term.name}", coef=weight * term.coef)

    def log_ratio(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return the ratio of ``distill`` if it has one: it is the one with the teacher."""
        return self._shown().log_ratio(batch, logprobs)

    def outside(self, batch: RolloutBatch, logprobs: Tensor) -> tuple[Tensor, Tensor] | None:
        """Ask the one whose ratio is shown."""
        return self._shown().outside(batch, logprobs)

    def token_advantages(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return the advantages of the one whose ratio is shown."""
        return self._shown().token_advantages(batch, logprobs)

    def dead(self, batch: RolloutBatch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Return the tokens that its clip silences."""
        return self._shown().dead(batch, logprobs, advantages)

    def imitated(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return the tokens of ``distill``."""
        mask = self.distill.imitated(batch, logprobs)
        return mask if self.distill_coef else mask & False

    def _shown(self) -> PolicyObjective:
        return self.rl if self.distill.ratio is None else self.distill
