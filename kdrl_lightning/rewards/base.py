"""The reward protocol, and the runner that keeps a bad reward from corrupting a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, TypeAlias

LARGEST = 3.4e38  # of float32
ATOMS = (str, int, float, bool, bytes, type(None))  # what nobody can change in place


@dataclass(frozen=True)
class Sample:
    """What a reward sees.

    Attributes:
        text: the decoded completion, without the token that ends it. Tags that are special tokens
            (``<think>``, ``<tool_call>``) stand in it.
        ids: its tokens as the engine sampled them.
        row: the prompt's row, with whatever columns the source has.
        truncated: the completion was cut at the token limit.
    """

    text: str
    ids: Sequence[int]
    row: Mapping[str, Any]
    truncated: bool = False


@dataclass(frozen=True)
class Verdict:
    """A reward that differs from the verifier's answer (partial credit, penalties).

    Attributes:
        reward: what is learned from.
        correct: the verifier accepts the completion.
        parts: what the reward is made of, by name; each is logged as ``reward/<name>_mean``.
    """

    reward: float
    correct: bool
    parts: Mapping[str, float] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, result: float | Verdict) -> Verdict:
        """Return a reward's result as a verdict; a number is correct from 1 on."""
        if isinstance(result, Verdict):
            return result
        value = _number("reward", result)
        return cls(value, value >= 1)


class TaskReward(ABC):
    """A reward with a class of its own; a plain callable of one sample will do as well."""

    @abstractmethod
    def __call__(self, sample: Sample) -> float | Verdict:
        """Judge one sample; an error is a failure of the reward, not of the completion."""

    def judge(self, samples: Sequence[Sample]) -> list[float | Verdict | Exception]:
        """Judge many; where one fails, its error stands in place of the verdict."""
        return [_attempt(self, sample) for sample in samples]

    def answer(self, sample: Sample) -> str | None:
        """Return what majority@k compares: the extraction that the verdict is based on.

        None has no vote. Here the whole text, without white space around it.
        """
        return sample.text.strip()

    def check(self, row: Mapping[str, Any]) -> None:
        """Look at a row before training; an error says that no completion of it can be judged."""
        for child in self.children():
            if isinstance(child, TaskReward):
                child.check(row)

    def children(self) -> Sequence[Reward]:
        """Return the rewards that this one is made of."""
        return ()

    def start(self) -> None:
        """Check before training that it can work here: libraries, processes.

        Raises:
            ConfigurationError: something is missing.
        """
        for child in self.children():
            if isinstance(child, TaskReward):
                child.start()

    def close(self) -> None:
        """End what it has started; it may be used again afterwards."""
        for child in self.children():
            if isinstance(child, TaskReward):
                child.close()


class BatchReward(TaskReward):
    """A reward that judges many samples at once, e.g. in several processes."""

    @abstractmethod
    def judge(self, samples: Sequence[Sample]) -> list[float | Verdict | Exception]:
        """Judge many; where one fails, its error stands in place of the verdict."""

    def __call__(self, sample: Sample) -> float | Verdict:
        """Judge one sample."""
        (result,) = self.judge([sample])
        if isinstance(result, Exception):
            raise result
        return result


Reward: TypeAlias = TaskReward | Callable[[Sample], float | Verdict]


def judge(reward: Reward, samples: Sequence[Sample]) -> list[Verdict | Exception]:
    """Judge samples by any reward; every result is a finite verdict or the error in its place.

    The reward gets copies: what it changes in a row or in tokens, it changes for itself alone.
    """
    results: Sequence[Any]
    samples = [own_copy(sample) for sample in samples]
    if isinstance(reward, TaskReward):
        try:
            results = reward.judge(samples)
            if len(results) != len(samples):
                raise ValueError(f"{len(results)} results for {len(samples)} samples")
        except Exception as error:
            return [error] * len(samples)
    else:
        results = [_attempt(reward, sample) for sample in samples]
    return [_checked(result) for result in results]


def own_copy(sample: Sample) -> Sample:
    """Return a sample whose row and tokens may be changed."""
    row: Mapping[str, Any] = dict(sample.row)
    if not all(type(value) in ATOMS for value in row.values()):
        with suppress(Exception):  # something in it cannot be copied, e.g. a lock
            row = deepcopy(sample.row)
    return Sample(sample.text, list(sample.ids), row, sample.truncated)


def walk(reward: Reward) -> Iterator[Reward]:
    """Yield a reward and all that it is made of."""
    yield reward
    for child in reward.children() if isinstance(reward, TaskReward) else ():
        yield from walk(child)


def _attempt(reward: Reward, sample: Sample) -> float | Verdict | Exception:
    try:
        return reward(sample)
    except Exception as error:
        return error


def _checked(result: Any) -> Verdict | Exception:
    if isinstance(result, Exception):
        return result
    try:
        verdict = Verdict.of(result)
        reward = _number("reward", verdict.reward)
        parts = {str(name): _number(name, value) for name, value in verdict.parts.items()}
        return Verdict(reward, bool(_number("correct", verdict.correct)), parts)
    except Exception as error:  # whatever a foreign type raises when it is read as a number
        return error


def _number(name: str, value: Any) -> float:
    """Read a number of Python, numpy or torch.

    Raises:
        TypeError: it is none; texts are none, and arrays of several values.
        ValueError: it is not finite in float32.
    """
    plain = value.item() if hasattr(value, "item") and getattr(value, "size", 1) != 0 else value
    if isinstance(plain, str | bytes | complex) or not hasattr(plain, "__float__"):
        raise TypeError(f"{name} must be a number: got {value!r:.60} ({type(value).__name__})")
    number = float(plain)
    if not abs(number) <= LARGEST:
        raise ValueError(f"{name} {number}")
    return number
