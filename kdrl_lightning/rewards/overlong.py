"""DAPO's soft penalty for completions near the token limit."""

from __future__ import annotations

from kdrl_lightning.errors import ConfigurationError, require_between
from kdrl_lightning.rewards.answers import answer_of
from kdrl_lightning.rewards.base import Reward, Sample, Verdict


class OverlongPenalty:
    """Another reward, less a penalty that grows over the last tokens before the limit.

    DAPO (arXiv 2503.14476, Eq. 13): 0 up to ``max_tokens - buffer_tokens``, then falling linearly
    to -1 at ``max_tokens``. The verdict on correctness is the other reward's.

    Args:
        reward: the reward of the task.
        max_tokens: token limit of a completion, as in ``data.max_tokens``.
        buffer_tokens: width of the penalty, from 1 to ``max_tokens``.

    >>> reward = OverlongPenalty(lambda sample: 1.0, max_tokens=10, buffer_tokens=4)
    >>> [reward(Sample("", [0] * n, {})).reward for n in (6, 8, 10)]
    [1.0, 0.5, 0.0]
    """

    def __init__(self, reward: Reward, max_tokens: int, buffer_tokens: int) -> None:
        require_between("max_tokens", max_tokens, 1, float("inf"))
        if not 1 <= buffer_tokens <= max_tokens:
            raise ConfigurationError(
                f"`buffer_tokens` must be from 1 to max_tokens {max_tokens}: got {buffer_tokens}. "
                "DAPO takes a fifth of it."
            )
        self.reward = reward
        self.max_tokens = max_tokens
        self.buffer_tokens = buffer_tokens

    def __call__(self, sample: Sample) -> Verdict:
        """Judge one sample."""
        verdict = Verdict.of(self.reward(sample))
        over = len(sample.ids) - (self.max_tokens - self.buffer_tokens)
        penalty = min(max(over / self.buffer_tokens, 0.0), 1.0)
        return Verdict(verdict.reward - penalty, verdict.correct)

    def answer(self, sample: Sample) -> str | None:
        """Return the answer that the task's reward finds."""
        return answer_of(self.reward, sample)
