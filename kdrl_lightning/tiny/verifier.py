"""A verifier that errs on purpose, to test how a method copes with it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from kdrl_lightning.errors import require_between, require_count
from kdrl_lightning.rewards.answers.extraction import answer_of
from kdrl_lightning.rewards.base import BatchReward, Reward, Sample, Verdict, judge


class ErringVerifier(BatchReward):
    """Adds errors to a reward: it accepts some wrong completions and rejects some right ones.

    Whether it errs depends on the seed, the prompt and the text alone, so the same completion
    always gets the same verdict, as with a flawed real verifier. A wrong verdict has reward 1 or 0.
    Evaluate with the reward itself: ``RoutedReward`` uses one reward for training rows and another
    for validation rows (``configs/base/erring_verifier.yaml``).

    Args:
        reward: decides what is right.
        accepts_wrong: fraction of the wrong completions that it accepts, in [0, 1].
        rejects_right: fraction of the right completions that it rejects, in [0, 1].
        seed: seed of the errors; another seed errs on other completions.

    Raises:
        ConfigurationError: a fraction is outside [0, 1].
    """

    def __init__(
        self,
        reward: Reward,
        accepts_wrong: float = 0.0,
        rejects_right: float = 0.0,
        seed: int = 0,
    ) -> None:
        require_between("accepts_wrong", accepts_wrong, 0.0, 1.0)
        require_between("rejects_right", rejects_right, 0.0, 1.0)
        require_count("seed", seed, 0, float("inf"))
        self.reward = reward
        self.accepts_wrong = accepts_wrong
        self.rejects_right = rejects_right
        self.seed = seed

    def judge(self, samples: Sequence[Sample]) -> list[float | Verdict | Exception]:
        """Judge the samples with the reward, and flip some of its verdicts."""
        verdicts = judge(self.reward, samples)
        return [self._turned(v, s) for v, s in zip(verdicts, samples, strict=True)]

    def children(self) -> Sequence[Reward]:
        """Return the reward that decides what is right."""
        return [self.reward]

    def answer(self, sample: Sample) -> str | None:
        """Return the answer that the reward extracts."""
        return answer_of(self.reward, sample)

    def _turned(self, verdict: Verdict | Exception, sample: Sample) -> Verdict | Exception:
        if isinstance(verdict, Exception):
            return verdict
        errs = self.rejects_right if verdict.correct else self.accepts_wrong
        if self._draw(sample) >= errs:
            return verdict
        return Verdict(float(not verdict.correct), not verdict.correct)

    def _draw(self, sample: Sample) -> float:
        """Return a number in [0, 1) that depends on seed, prompt and text."""
        key = repr((self.seed, sample.row["prompt"], sample.text))
        digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=6).digest()
        return int.from_bytes(digest, "big") / 2**48
