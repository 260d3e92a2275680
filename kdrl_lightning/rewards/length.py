"""DAPO's soft penalty for completions near the token limit."""

from __future__ import annotations

from kdrl_lightning.errors import ConfigurationError, require_count
from kdrl_lightning.rewards.base import Sample, TaskReward, Verdict


class LengthPenalty(TaskReward):
    """A penalty that grows over the last tokens before the token limit.

    DAPO (arXiv 2503.14476, Eq. 13): 0 up to ``max_tokens - buffer_tokens``, then falling linearly
    to -1 at ``max_tokens``. The penalty does not judge correctness: add it to a task's reward with
    ``WeightedRewards``.

    Args:
        max_tokens: token limit of a completion, as in ``data.rollout.max_tokens``.
        buffer_tokens: tokens over which the penalty falls, from 1 to ``max_tokens``.

    Raises:
        ConfigurationError: ``buffer_tokens`` is outside this range.

    >>> penalty = LengthPenalty(max_tokens=10, buffer_tokens=4)
    >>> [penalty(Sample("", [0] * n, {})).reward for n in (6, 8, 10)]
    [0.0, -0.5, -1.0]
    """

    def __init__(self, max_tokens: int, buffer_tokens: int) -> None:
        require_count("max_tokens", max_tokens, 1, float("inf"))
        if not 1 <= buffer_tokens <= max_tokens:
            raise ConfigurationError(
                f"`buffer_tokens` must be from 1 to max_tokens {max_tokens}: got {buffer_tokens}. "
                "DAPO uses a fifth of max_tokens."
            )
        self.max_tokens = max_tokens
        self.buffer_tokens = buffer_tokens

    def __call__(self, sample: Sample) -> Verdict:
        """Return the penalty of one sample, in [-1, 0], with ``correct`` false."""
        over = len(sample.ids) - (self.max_tokens - self.buffer_tokens)
        return Verdict(0.0 - min(max(over / self.buffer_tokens, 0.0), 1.0), False)
