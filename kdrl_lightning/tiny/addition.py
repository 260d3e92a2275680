"""Column addition with written carries: a task small enough to learn on a CPU in seconds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdrl_lightning.errors import ConfigurationError, require_between
from kdrl_lightning.prompts.base import PromptSource
from kdrl_lightning.rewards.answers.references import accepted
from kdrl_lightning.rewards.base import Sample

SYMBOLS = "0123456789+=,#"
# The prompt that shows a worked answer to a model that has learned to read one.
READING = "{context}#{prompt}"


def worked_answer(a: int, b: int, digits: int, forget: Sequence[bool] | None = None) -> str:
    """Return the column sums, least significant first, then ``#`` and the result.

    The result has ``digits + 1`` digits.

    Args:
        a: first number, from 0 to ``10**digits - 1``.
        b: second number, from 0 to ``10**digits - 1``.
        digits: columns of the addition, at least 1.
        forget: one flag for each column but the last; ``forget[i]`` drops the carry out of column
            ``i``. The carry out of the last column is the leading digit of the result, so that
            column has no flag. None keeps all carries.

    Raises:
        ConfigurationError: a number does not fit, or ``forget`` has another length.

    >>> worked_answer(1234, 5678, 4)
    '12,11,09,06#06912'
    >>> worked_answer(1234, 5678, 4, forget=[True, False, False])
    '12,10,09,06#06902'
    """
    _at_least("digits", digits, 1)
    for name, value in (("a", a), ("b", b)):
        if not 0 <= value < 10**digits:
            raise ConfigurationError(
                f"`{name}` must have at most {digits} digits and no sign: got {value}. "
                f"Pass a number from 0 to {10**digits - 1}."
            )
    if forget is None:
        forget = [False] * (digits - 1)
    if len(forget) != digits - 1:
        raise ConfigurationError(
            f"`forget` must have one flag for each column but the last: got {len(forget)}. "
            f"Pass {digits - 1} flags."
        )
    carry = 0
    sums: list[int] = []
    for i in range(digits):
        total = a // 10**i % 10 + b // 10**i % 10 + carry
        sums.append(total)
        carry = 0 if i < digits - 1 and forget[i] else total // 10
    columns = ",".join(f"{total:02d}" for total in sums)
    result = str(carry) + "".join(str(total % 10) for total in reversed(sums))
    return f"{columns}#{result}"


def addition_reward(sample: Sample) -> float:
    """Return 1 if the text after the only ``#`` is the row's answer, else 0."""
    if sample.text.count("#") != 1:
        return 0.0
    return float(sample.text.partition("#")[2] in accepted(sample.row))


class ColumnAddition(PromptSource):
    """Addition problems with their answers; problem ``i`` depends on ``(seed, i)`` alone.

    Args:
        size: number of problems, at least 1.
        seed: seed of the problems; another seed gives other problems.
        digits: digits of each number, at least 1; the shipped models are trained on four.
        solutions: add the worked answer as the column ``solution``, for a teacher that reads it.

    >>> ColumnAddition(size=1, digits=2)[0]
    {'prompt': '85+63=', 'answer': '148'}
    >>> ColumnAddition(size=1, digits=2, solutions=True)[0]["solution"]
    '08,14#148'
    """

    def __init__(
        self, size: int = 4096, seed: int = 0, digits: int = 4, solutions: bool = False
    ) -> None:
        _at_least("size", size, 1)
        _at_least("seed", seed, 0)
        _at_least("digits", digits, 1)
        self.size = size
        self.seed = seed
        self.digits = digits
        self.solutions = solutions

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, str]:
        a, b, _ = _problem(index, self.size, self.seed, self.digits)
        answer = f"{a + b:0{self.digits + 1}d}"
        row = {"prompt": _prompt(a, b, self.digits), "answer": answer}
        if self.solutions:
            row["solution"] = worked_answer(a, b, self.digits)
        return row


class AdditionTraces(PromptSource):
    """Worked additions whose annotator forgets each carry with probability ``slip``.

    Problem ``i`` is the same as in a ``ColumnAddition`` with this seed and number of digits.

    Args:
        size: number of problems, at least 1.
        seed: seed of the problems and of the forgotten carries.
        digits: digits of each number, at least 1.
        slip: probability that the annotator forgets a carry, in [0, 1].
        shown: probability that the prompt shows the right worked answer first, as ``READING``
            writes it, in [0, 1]; the annotator then copies it and forgets nothing.
    """

    def __init__(
        self,
        size: int = 4096,
        seed: int = 0,
        digits: int = 4,
        slip: float = 0.0,
        shown: float = 0.0,
    ) -> None:
        _at_least("size", size, 1)
        _at_least("seed", seed, 0)
        _at_least("digits", digits, 1)
        if not 0.0 <= slip <= 1.0:
            raise ConfigurationError(
                f"`slip` must be in [0, 1]: got {slip}. "
                "Pass the probability that a carry is forgotten."
            )
        require_between("shown", shown, 0.0, 1.0)
        self.size = size
        self.seed = seed
        self.digits = digits
        self.slip = slip
        self.shown = shown

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, str]:
        a, b, rng = _problem(index, self.size, self.seed, self.digits)
        forget = [bool(draw < self.slip) for draw in rng.random(self.digits - 1)]
        prompt = _prompt(a, b, self.digits)
        if rng.random() < self.shown:
            right = worked_answer(a, b, self.digits)
            prompt = READING.replace("{context}", right).replace("{prompt}", prompt)
            return {"prompt": prompt, "completion": right}
        return {"prompt": prompt, "completion": worked_answer(a, b, self.digits, forget)}


def _problem(i: int, size: int, seed: int, digits: int) -> tuple[int, int, np.random.Generator]:
    if not 0 <= i < size:
        raise IndexError(f"`index` must be in [0, {size - 1}]: got {i}")
    rng = np.random.default_rng([seed, i])
    a, b = (int(number) for number in rng.integers(0, 10**digits, size=2))
    return a, b, rng


def _prompt(a: int, b: int, digits: int) -> str:
    return f"{a:0{digits}d}+{b:0{digits}d}="


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigurationError(
            f"`{name}` must be at least {least}: got {value}. Pass a whole number from {least} on."
        )
