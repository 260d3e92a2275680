"""Runs a reward so that its failures cannot corrupt the training run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kdrl_lightning.common.untyped import Row
from kdrl_lightning.errors import ConfigurationError, TrainingStopped, require_between
from kdrl_lightning.rewards.answers.references import shorten
from kdrl_lightning.rewards.base import Reward, Sample, TaskReward, Verdict, judge, walk
from kdrl_lightning.rewards.callables import require_callable


@dataclass(frozen=True)
class RewardFailures:
    """What happens if the reward fails on a completion.

    Args:
        max_frac: stop if the reward fails on more than this fraction of a rollout's completions,
            and on more than one; in [0, 1].
        reward: the reward of a completion on which the reward fails; the completion counts as
            wrong.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    max_frac: float = 0.1
    reward: float = 0.0

    def __post_init__(self) -> None:
        require_between("reward_failures.max_frac", self.max_frac, 0.0, 1.0)
        require_between("reward_failures.reward", self.reward, -1e9, 1e9)


class RewardRunner:
    """Calls a reward and counts its failures; a completion on which it fails counts as wrong.

    Args:
        reward: any callable of one sample, or a ``TaskReward``. If it returns a plain number, the
            completion counts as correct if the number is at least 1.
        failures: what happens if the reward fails.

    Attributes:
        failures: number of failures so far, including evaluations.

    Raises:
        ConfigurationError: the reward, or one that it combines, cannot be called with a sample.
    """

    def __init__(self, reward: Reward, failures: RewardFailures = RewardFailures()) -> None:
        # Imported here because it imports torch, which the reward's processes do not need.
        from kdrl_lightning.rewards.processes.surroundings import Surroundings

        for part in walk(reward):
            require_callable("reward", part)
        self.reward = reward
        self.max_failure_frac = failures.max_frac
        self.failed = Verdict(float(failures.reward), False)
        self.failures = self._untold = 0
        self._shown: set[type[Exception]] = set()
        self._surroundings = Surroundings()

    def try_once(self, row: Row) -> None:
        """Try the reward on a real row before training.

        The reward judges two completions: an empty one, which students do produce, and the prompt.

        Raises:
            ConfigurationError: the reward raises, or does not return a finite number.
        """
        texts, results = self._tried(row)
        for text, result in zip(texts, results, strict=True):
            if isinstance(result, ConfigurationError):  # its message already names the cure
                raise result
            if isinstance(result, Exception):
                raise ConfigurationError(
                    f"`reward` must return a finite number: got {_describe(result)} for the "
                    f"completion {text[:40]!r} of the row {shorten(row)}. "
                    "Fix the reward function."
                ) from result
        self.check([row])

    def _judge(self, samples: Sequence[Sample]) -> list[Verdict | Exception]:
        with self._surroundings.kept():
            return judge(self.reward, samples)

    def _tried(self, row: Row) -> tuple[Sequence[str], list[Verdict | Exception]]:
        texts = ("", str(row.get("prompt", "text")))
        return texts, self._judge([Sample(text, [0] * len(text), row) for text in texts])

    def require_feedback(self, rows: Iterable[Row]) -> None:
        """Check that the reward gives feedback on wrong completions, for a ``FeedbackContext``.

        Raises:
            ConfigurationError: it gives none on the completions that ``try_once`` tries.
        """
        for row in rows:
            verdicts = [v for v in self._tried(row)[1] if isinstance(v, Verdict)]
            if any(verdict.feedback.strip() for verdict in verdicts):
                return
        raise ConfigurationError(
            "`reward` must return feedback for a FeedbackContext: got none for an empty completion "
            "and for one that repeats the prompt. Return `Verdict(reward, correct, "
            "feedback=...)`, or use another context."
        )

    def warn_of_lists(self, rows: Sequence[Row], name: str) -> None:
        """Warn if answers are lists or dicts written as text, which count as one answer each.

        Args:
            rows: the rows of one set.
            name: the setting that gives the set, for the message.
        """
        if not isinstance(self.reward, TaskReward):
            return
        found = [text for row in rows if (text := self.reward.list_as_text(row)) is not None]
        if found:
            warnings.warn(
                f"the answer of {len(found)} of {len(rows)} checked rows of `{name}` is the text "
                f"of a list or a dict, e.g. {found[0]!r:.60}, and only a completion with this "
                "whole text is right. If each entry is an accepted answer, put the source into "
                "ParsedPrompts (`columns: [answer]`).",
                stacklevel=2,
            )

    def check(self, rows: Iterable[Row]) -> None:
        """Let the reward check rows before training, without completions.

        Raises:
            ConfigurationError: the reward could not judge a row; the message shows the row.
        """
        if not isinstance(self.reward, TaskReward):
            return
        for row in rows:
            try:
                with self._surroundings.kept():
                    self.reward.check(row)
            except ConfigurationError:  # its message already names the cure
                raise
            except Exception as error:
                raise ConfigurationError(
                    f"`reward` must be able to judge every row: got {_describe(error)} for the row "
                    f"{shorten(row)}. Fix the row, or remove it."
                ) from error

    def __call__(self, samples: Sequence[Sample], training: bool = True) -> list[Verdict]:
        """Judge samples; return one verdict per sample, in their order.

        Args:
            samples: the samples of one rollout or one evaluation batch.
            training: stop on too many failures; an evaluation only warns.

        Raises:
            TrainingStopped: the reward failed on too many samples of a rollout.
        """
        results = self._judge(samples)
        errors = [result for result in results if isinstance(result, Exception)]
        self.failures += len(errors)
        self._untold += len(errors) if training else 0
        if errors:
            self._report(errors, len(samples), training)
        return [self.failed if isinstance(result, Exception) else result for result in results]

    def take_failures(self) -> int:
        """Return the number of failures in training since the last call."""
        untold, self._untold = self._untold, 0
        return untold

    def start(self) -> None:
        """Check that the reward's libraries and processes work on this machine.

        Raises:
            ConfigurationError: something is missing.
        """
        if isinstance(self.reward, TaskReward):
            with self._surroundings.kept():
                self.reward.start()

    def close(self) -> None:
        """Stop the reward's processes."""
        if isinstance(self.reward, TaskReward):
            self.reward.close()

    def _report(self, errors: list[Exception], count: int, training: bool) -> None:
        last = _describe(errors[-1])
        if training and len(errors) > max(1, math.floor(self.max_failure_frac * count + 1e-9)):
            raise TrainingStopped(
                f"the reward failed on {len(errors)} of {count} completions, above "
                f"{self.max_failure_frac:.0%}: the last error was {last}. Fix the reward function."
            )
        kinds = {type(error) for error in errors}
        if not training or kinds - self._shown:
            where = "an evaluation" if not training else "a rollout"
            which = "" if not training else f" and get {self.failed.reward:g}"
            warnings.warn(
                f"the reward failed on {len(errors)} of {count} completions of {where}, "
                f"which count as wrong{which}: the last error was {last}.",
                stacklevel=3,
            )
        self._shown |= kinds if training else set()


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
