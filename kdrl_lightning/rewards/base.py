"""The reward protocol: what a reward gets and returns, and how a list of samples is judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from kdrl_lightning.common.untyped import Row

# `Any`: what a user's function may return, until it is checked.

LARGEST = 3.4e38  # the largest float32, rounded down
ATOMS = (str, int, float, bool, bytes, type(None))  # immutable: they need no copy


@dataclass(frozen=True)
class Sample:
    """One completion and its prompt's row, as a reward sees them.

    Attributes:
        text: the decoded completion without its end token. Tags that are special tokens
            (``<think>``, ``<tool_call>``) are kept.
        ids: the completion's token ids as the engine sampled them.
        row: the prompt's row with all columns of the source.
        truncated: the completion was cut at the token limit.
    """

    text: str
    ids: Sequence[int]
    row: Row
    truncated: bool = False


@dataclass(frozen=True)
class Verdict:
    """A reward together with the verifier's decision, which may differ (partial credit, penalties).

    Attributes:
        reward: the value that the policy learns from.
        correct: the verifier accepts the completion.
        parts: the components of the reward by name; each is logged as ``reward/<name>_mean``.
        feedback: what the environment says about the completion, e.g. the error of a failed test,
            for a teacher with a ``FeedbackContext``; empty if there is none.
    """

    reward: float
    correct: bool
    parts: Mapping[str, float] = field(default_factory=dict, hash=False)
    feedback: str = ""

    @classmethod
    def of(cls, result: float | Verdict) -> Verdict:
        """Convert a reward's result to a verdict; a number counts as correct if it is at least 1.

        Raises:
            TypeError: the result is not a number.
            ValueError: the number is not finite in float32.
        """
        if isinstance(result, Verdict):
            return result
        value = _number("reward", result)
        return cls(value, value >= 1)


class TaskReward(ABC):
    """Base class of rewards with checks or processes; without these, a plain function will do."""

    @abstractmethod
    def __call__(self, sample: Sample) -> float | Verdict:
        """Judge one sample; raise only if the reward itself fails, not for a wrong completion."""

    def judge(self, samples: Sequence[Sample]) -> list[float | Verdict | Exception]:
        """Judge several samples; return the exception of each on which the reward fails."""
        return [attempt(self, sample) for sample in samples]

    def answer(self, sample: Sample) -> str | None:
        """Return the answer that majority@k compares: the text on which the verdict is based.

        A completion whose answer is None does not vote. The default is the whole text, stripped.
        """
        return sample.text.strip()

    def check(self, row: Row) -> None:
        """Check a row before training; raise if the reward could judge no completion of it."""
        for child in self.children():
            if isinstance(child, TaskReward):
                child.check(row)

    def list_as_text(self, row: Row) -> str | None:
        """Return the row's answer if it is a list or a dict written as text; else None.

        Some files keep a list of accepted answers as such a text. It counts as one answer, which
        no completion would equal.
        """
        tasks = (child for child in self.children() if isinstance(child, TaskReward))
        return next(filter(None, (child.list_as_text(row) for child in tasks)), None)

    def children(self) -> Sequence[Reward]:
        """Return the rewards that this reward combines."""
        return ()

    def start(self) -> None:
        """Check before training that the reward's libraries and processes work on this machine.

        Raises:
            ConfigurationError: something is missing.
        """
        for child in self.children():
            if isinstance(child, TaskReward):
                child.start()

    def close(self) -> None:
        """Stop the processes that the reward has started; it can be used again afterwards."""
        for child in self.children():
            if isinstance(child, TaskReward):
                child.close()


class BatchReward(TaskReward):
    """A reward that judges many samples at once, e.g. in several processes."""

    @abstractmethod
    def judge(self, samples: Sequence[Sample]) -> list[float | Verdict | Exception]:
        """Judge several samples; return the exception of each on which the reward fails."""

    def __call__(self, sample: Sample) -> float | Verdict:
        """Judge one sample."""
        (result,) = self.judge([sample])
        if isinstance(result, Exception):
            raise result
        return result


Reward: TypeAlias = TaskReward | Callable[[Sample], float | Verdict]


def judge(reward: Reward, samples: Sequence[Sample]) -> list[Verdict | Exception]:
    """Judge samples with any reward; return one finite verdict or exception per sample.

    The reward gets copies, so that it cannot change the rows and tokens of the run.
    """
    samples = [own_copy(sample) for sample in samples]
    return [_checked(result) for result in _judged(reward, samples)]


def _judged(reward: Reward, samples: Sequence[Sample]) -> Sequence[Any]:
    if not isinstance(reward, TaskReward):
        return [attempt(reward, sample) for sample in samples]
    try:
        results = reward.judge(samples)
        if len(results) != len(samples):
            raise ValueError(f"{len(results)} results for {len(samples)} samples")
    except Exception as error:
        return [error] * len(samples)
    return results


def own_copy(sample: Sample) -> Sample:
    """Copy a sample, so that its row and tokens may be changed."""
    row: Row = {name: _copied(value) for name, value in sample.row.items()}
    return Sample(sample.text, list(sample.ids), row, sample.truncated)


def _copied(value: Any) -> Any:
    if type(value) not in ATOMS:
        with suppress(Exception):  # it cannot be copied, e.g. a lock
            return deepcopy(value)
    return value


def walk(reward: Reward) -> Iterator[Reward]:
    """Yield a reward and, recursively, all rewards that it combines."""
    yield reward
    for child in reward.children() if isinstance(reward, TaskReward) else ():
        yield from walk(child)


def attempt(call: Callable[[Any], Any], argument: Any) -> Any:
    """Return the result of a call, or its exception; a ``sys.exit`` in it counts as an error."""
    try:
        return call(argument)
    except Exception as error:
        return error
    except SystemExit as error:
        return RuntimeError(f"it called sys.exit({error.code})")


def _checked(result: Any) -> Verdict | Exception:
    if isinstance(result, Exception):
        return result
    try:
        verdict = Verdict.of(result)
        reward = _number("reward", verdict.reward)
        parts = {str(name): _number(name, value) for name, value in verdict.parts.items()}
        feedback = verdict.feedback
        if not isinstance(feedback, str):
            raise TypeError(f"feedback must be a string: got {feedback!r:.60}")
        return Verdict(reward, bool(_number("correct", verdict.correct)), parts, feedback)
    except Exception as error:  # converting a user's type to a number may raise anything
        return error


def _number(name: str, value: object) -> float:
    """Convert a scalar of Python, numpy or torch to a float.

    Raises:
        TypeError: the value is not a number, e.g. a text or an array of several values.
        ValueError: the value is not finite in float32.
    """
    plain = value.item() if hasattr(value, "item") and getattr(value, "size", 1) != 0 else value
    if isinstance(plain, str | bytes | complex) or not hasattr(plain, "__float__"):
        raise TypeError(f"{name} must be a number: got {value!r:.60} ({type(value).__name__})")
    number = float(plain)
    if not abs(number) <= LARGEST:
        raise ValueError(f"{name} {number}")
    return number
