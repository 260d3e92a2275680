"""``PolicyObjective``: a ratio rule times an advantage rule, plus further terms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses import TokenScores, k3
from kdrl_lightning.losses.teacher_chunks import whole_chunks
from kdrl_lightning.objectives.advantages import Advantage
from kdrl_lightning.objectives.base import (
    Objective,
    Reduction,
    Term,
    check_coefficient,
    known,
    teacher_logprobs,
)
from kdrl_lightning.objectives.corrections import (
    EngineCorrection,
    NoCorrection,
    TruncatedImportance,
)
from kdrl_lightning.objectives.divergences import DistillTerm
from kdrl_lightning.objectives.ratios import Ratio
from kdrl_lightning.objectives.selections import ExceptEndToken, Selection
from kdrl_lightning.rollout_batch import TEACHER, RolloutBatch


class PolicyObjective(Objective):
    """A loss of parts: ``policy(ratio, advantage) + distill + ref_kl_coef KL(pi || pi_ref)``.

    GRPO, KDRL, RLAD and the others are this class with fixed parts. To mix methods, give this class
    the parts that you want.

    Args:
        ratio: the ratio that multiplies the advantage, and its clip; None: no policy loss.
        advantage: rule that gives each token an advantage; None: no policy loss.
        distill: a distillation term added to the policy loss.
        selection: rules that select the tokens on which the teacher is imitated; a token must pass
            all of them. Empty: all tokens.
        teacher_tokens: ratio rule for completions that the teacher sampled.
        engine_correction: weights that correct the student's sampled tokens for an engine whose
            log-probabilities differ from the trainer's. None: ``TruncatedImportance`` if they can
            differ and a term reads sampled tokens, else nothing. ``NoCorrection`` switches it off.
        rl_coef: weight of the policy loss, at least 0.
        ref_kl_coef: weight of the KL to the module's ``reference``, by default the initial student;
            at least 0. It is estimated by k3 on the student's samples, as in GRPO's paper, so it
            has the gradient of the **forward** KL.
        reduction: how per-token values become one number, see ``losses/reduction.py``.
        entropy_coef: weight of the entropy bonus, at least 0.

    Raises:
        ConfigurationError: the parts do not fit together, or a coefficient is out of range.
    """

    def __init__(
        self,
        ratio: Ratio | None,
        advantage: Advantage | None,
        distill: DistillTerm | None = None,
        selection: Sequence[Selection] = (),
        teacher_tokens: Ratio | None = None,
        engine_correction: EngineCorrection | None = None,
        rl_coef: float = 1.0,
        ref_kl_coef: float = 0.0,
        reduction: Reduction = "token_mean",
        entropy_coef: float = 0.0,
    ) -> None:
        super().__init__(reduction, entropy_coef)
        if (ratio is None) != (advantage is None) or (ratio is None and distill is None):
            raise ConfigurationError(
                "`ratio` and `advantage` must be given together, or `distill` alone: got "
                f"{_names(ratio, advantage, distill)}. Add the missing part."
            )
        if teacher_tokens is not None and ratio is None:
            raise ConfigurationError(
                f"`teacher_tokens` must be given with a policy loss: got {_names(teacher_tokens)} "
                f"and {_names(distill)} alone. Add `ratio` and `advantage`, or drop it."
            )
        if distill is not None and distill.needs_advantages:
            _check_second(distill, advantage, teacher_tokens)
        compares = advantage is not None and advantage.needs_groups
        if not compares and any(s.needs_advantages for s in selection or ()):
            raise ConfigurationError(
                "`advantage_threshold` must be used with advantages from rewards: got "
                f"{_names(advantage, distill)}. Use KDRL, or drop the gate."
            )
        self.ratio = ratio
        self.advantage = advantage
        self.distill = distill
        self.selection = tuple(selection or ())
        self.teacher_tokens = teacher_tokens
        self.engine_correction = engine_correction
        self.rl_coef = check_coefficient("rl_coef", rl_coef)
        self.ref_kl_coef = check_coefficient("ref_kl_coef", ref_kl_coef)
        self.needs_teacher = any(p and p.needs_teacher for p in (ratio, advantage, distill))
        if self.selection and not self.needs_teacher:
            raise ConfigurationError(
                f"`selection` must be used with a part that imitates the teacher: got "
                f"{_names(*self.selection)} and {_names(ratio, advantage)}. Drop it, or take an "
                "objective with a teacher."
            )
        # A divergence of distributions compares the end token's probability at every position.
        exact = distill is not None and not distill.sampled
        except_end = any(isinstance(s, ExceptEndToken) for s in self.selection)
        self.leaves_out_end = except_end and not exact
        self.needs_reference = ref_kl_coef > 0.0 or bool(advantage and advantage.needs_reference)
        self.needs_groups = compares
        self.takes_teacher_completions |= teacher_tokens is not None
        if distill is not None:
            self.top_k, self.divergence = distill.top_k, distill.divergence
            self.teacher_top_k = distill.teacher_top_k

    def prepare(self, rollout: RolloutBatch) -> RolloutBatch:
        """Return the rollout with advantages, the tokens to imitate and the engine correction."""
        # Prepare advantages twice: selections may read them, and shaped ones read the selection.
        mask = rollout.taught_mask
        if self.distill is None or self.distill.sampled:
            # On the teacher's samples only a divergence of distributions is valid.
            mask = mask & rollout.student_mask
        mask = whole_chunks(mask, rollout.chunk_places)
        rollout = rollout.replace(imitation_mask=mask)
        if self.advantage is not None:
            rollout = rollout.replace(advantages=self.advantage.prepare(rollout))
        for selection in self.selection:
            chosen = selection(rollout)
            mask = mask & (chosen[:, None] if chosen.dim() == 1 else chosen)
        mask = whole_chunks(mask, rollout.chunk_places)
        rollout = rollout.replace(imitation_mask=mask)
        if self.advantage is not None and self.selection:
            rollout = rollout.replace(advantages=self.advantage.prepare(rollout))
        if self.distill is not None:
            rollout = rollout.replace(imitation_weights=self.distill.weights(rollout))
        correction = self.engine_correction or self._default_correction(rollout)
        if isinstance(correction, NoCorrection):
            return rollout
        weights = correction(rollout)
        return rollout.replace(importance_weights=torch.where(rollout.student_mask, weights, 1.0))

    def reads_old_scores(self, rollout: RolloutBatch) -> bool:
        """Return whether a part reads the student's scores; True if you override ``prepare``."""
        correction = self.engine_correction or self._default_correction(rollout)
        of_student = self.top_k > 0 or correction.reads_old_scores
        return of_student or self.reads_teacher_scores(rollout)

    def reads_teacher_scores(self, rollout: RolloutBatch) -> bool:
        """Return whether a part reads the teacher's scores; True if you override ``prepare``."""
        if type(self).prepare is not PolicyObjective.prepare:
            return True
        parts = (self.advantage, self.distill, *self.selection)
        return any(part.reads_old_scores for part in parts if part is not None)

    def _default_correction(self, rollout: RolloutBatch) -> EngineCorrection:
        # A ratio to the engine's log-probs is a correction; terms without sampled tokens need none.
        corrected = self.ratio is not None and self.ratio.to_behavior
        sampled = self.ratio or self.needs_reference or (self.distill and self.distill.corrected)
        if rollout.engine_exact or corrected or not sampled:
            return NoCorrection()
        return TruncatedImportance()

    def terms(self, batch: RolloutBatch, scores: TokenScores) -> Iterator[Term]:
        """Yield the policy loss, the distillation term and the reference KL."""
        weights = 1.0 if batch.importance_weights is None else batch.importance_weights
        if self.ratio is not None:
            advantages, logprobs = self.token_advantages(batch, scores.logprobs), scores.logprobs
            if self.teacher_tokens is None:
                policy = self.ratio.loss(batch, logprobs, advantages)
            else:
                rows = _theirs(batch)
                ours = self.ratio.loss(_neutral(batch, rows, logprobs), logprobs, advantages)
                theirs = self.teacher_tokens.loss(
                    _neutral(batch, ~rows, logprobs), logprobs, advantages
                )
                policy = torch.where(rows, theirs, ours)
            policy = policy * weights
            yield Term("policy", policy, self.rl_coef)
        if self.distill is not None:
            where = self.distill.where(batch)
            loss = self.distill.per_token(batch, scores, where)
            yield Term(
                self.distill.name,
                loss * weights if self.distill.corrected else loss,
                self.distill.coef,
                where,
                self.distill.per_imitated_token,
            )
        if self.needs_reference:
            ref = known(batch.ref_logprobs, "ref_logprobs")
            reference = k3(scores.logprobs, ref) * weights
            yield Term("ref_kl", reference, self.ref_kl_coef, batch.student_mask)

    def token_advantages(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return ``[B, T]`` advantages; the teacher's gap is 0 on tokens that are not imitated."""
        gap = torch.zeros_like(logprobs)
        if self.advantage is None:
            return gap
        if self.advantage.needs_teacher:
            teacher = teacher_logprobs(batch, logprobs)
            mask = known(batch.imitation_mask, "imitation_mask") & batch.student_mask
            gap = torch.where(mask, teacher - logprobs.detach(), 0.0)
        return self.advantage(batch, gap)

    def log_ratio(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return the clipped ratio's log: on the teacher's samples, that of ``teacher_tokens``."""
        ratio = self._shown()
        if ratio is None:
            return super().log_ratio(batch, logprobs)
        ours = ratio.log_ratio(batch, logprobs)
        if self.teacher_tokens is None:
            return ours
        return torch.where(_theirs(batch), self.teacher_tokens.log_ratio(batch, logprobs), ours)

    def outside(self, batch: RolloutBatch, logprobs: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return where the ratio of ``log_ratio`` is below, and where above, its clip range."""
        ratio = self._shown()
        if ratio is None:
            return None
        below, above = ratio.outside(batch, logprobs)
        if self.teacher_tokens is None:
            return below, above
        low, high = self.teacher_tokens.outside(batch, logprobs)
        return torch.where(_theirs(batch), low, below), torch.where(_theirs(batch), high, above)

    def dead(self, batch: RolloutBatch, logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Return the tokens whose policy gradient the clip removes."""
        ratio = self._shown()
        if ratio is None:
            return torch.zeros_like(batch.loss_mask)
        ours = ratio.dead(batch, logprobs, advantages)
        if self.teacher_tokens is None:
            return ours
        theirs = self.teacher_tokens.dead(batch, logprobs, advantages)
        return torch.where(_theirs(batch), theirs, ours)

    def imitated(self, batch: RolloutBatch, logprobs: Tensor) -> Tensor:
        """Return the tokens on which the teacher enters the gradient.

        These are the tokens of the distillation term, and the tokens of the policy loss whose ratio
        or advantage the teacher changes and whose gradient the clip does not remove.
        """
        out = torch.zeros_like(batch.loss_mask)
        weights = batch.importance_weights
        kept = batch.loss_mask if weights is None else batch.loss_mask & (weights != 0)
        if self.distill is not None and self.distill.coef:
            out = self.distill.imitated(batch, logprobs)
            out = out & kept if self.distill.sampled else out
        if self.ratio is None or self.advantage is None or not self.rl_coef:
            return out
        advantages = self.token_advantages(batch, logprobs)
        changed = self.advantage.changed(batch, advantages)
        if self.ratio.anchored:
            mask = known(batch.imitation_mask, "imitation_mask")
            changed = changed | (mask & (advantages != 0))
        alive = ~self.ratio.dead(batch, logprobs, advantages)
        return out | (changed & alive & kept & batch.student_mask)

    def _shown(self) -> Ratio | None:
        """Return the ratio that statistics describe; of two, that of the distillation term."""
        second = None if self.distill is None else self.distill.ratio
        return second or self.ratio


def _check_second(
    distill: DistillTerm, advantage: Advantage | None, teacher_tokens: Ratio | None
) -> None:
    """Refuse a second surrogate without advantages from rewards, or with teacher completions."""
    if teacher_tokens is not None:
        raise ConfigurationError(
            f"`teacher_tokens` must be None with `distill` {type(distill).__name__}, which has no "
            f"rule for the teacher's completions: got {_names(teacher_tokens)}. Drop one of them."
        )
    if advantage is None or advantage.needs_teacher or not advantage.needs_groups:
        raise ConfigurationError(
            f"`distill` {type(distill).__name__} must be added to a policy loss with advantages "
            f"from rewards alone: got {_names(advantage)}. Use Advantage, e.g. GRPO."
        )


def _neutral(batch: RolloutBatch, rows: Tensor, logprobs: Tensor) -> RolloutBatch:
    """Return the batch with every ratio 1 on ``rows``: an overflow there would give NaN gradients.

    The other ratio rule handles these rows.
    """
    names = ("old_logprobs", "rollout_logprobs", "teacher_logprobs")
    fields = {n: v for n in names if (v := getattr(batch, n)) is not None}
    same = logprobs.detach()
    if batch.chunk_places is not None:  # each token of these rows is a separate chunk
        batch = batch.replace(chunk_places=batch.chunk_places.masked_fill(rows, 0))
    return batch.replace(**{n: torch.where(rows, same, v) for n, v in fields.items()})


def _theirs(batch: RolloutBatch) -> Tensor:
    return (batch.source == TEACHER)[:, None]


def _names(*parts: object) -> str:
    return ", ".join("None" if p is None else type(p).__name__ for p in parts)
