"""Supervised fine-tuning: cross-entropy on given completions."""

from __future__ import annotations

from collections.abc import Iterator

from kdrl_lightning.objectives.base import Objective, Term, TokenScores
from kdrl_lightning.rollout_batch import RolloutBatch


class SFT(Objective):
    """Cross-entropy of the completion's tokens; also the objective that makes the embedded pair."""

    def terms(self, batch: RolloutBatch, scores: TokenScores) -> Iterator[Term]:
        """Yield the negative log-likelihood."""
        yield Term("nll", -scores.logprobs)
