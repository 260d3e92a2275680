"""Sums of digits modulo 3, written as running residues: wrong reasoning is often right by chance.

``5718=`` is answered ``2,0,1,0#0``. A digit that is left out repeats the last residue. There are
only three answers, so about one wrong reasoning in three ends with the right one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdrl_lightning.prompts import PromptSource
from kdrl_lightning.rewards import Sample

MODULUS = 3


def worked_answer(digits: Sequence[int], skip: Sequence[bool]) -> str:
    """Return the running residues, then ``#`` and the last one; ``skip`` leaves out digits.

    >>> worked_answer([5, 7, 1, 8], [False] * 4)
    '2,0,1,0#0'
    >>> worked_answer([5, 7, 1, 8], [False, True, True, False])
    '2,2,2,1#1'
    """
    residue, steps = 0, []
    for digit, skipped in zip(digits, skip, strict=True):
        residue = residue if skipped else (residue + digit) % MODULUS
        steps.append(str(residue))
    return f"{','.join(steps)}#{residue}"


class Residues(PromptSource):
    """Problems with their answer and whole right reasoning; row ``i`` depends on ``(seed, i)``.

    Args:
        size: number of problems.
        seed: seed of the problems.
        digits: length of the sum.
    """

    def __init__(self, size: int = 4096, seed: int = 0, digits: int = 4) -> None:
        self.size = size
        self.seed = seed
        self.digits = digits

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, str]:
        numbers, _ = self._draw(index)
        reasoning = worked_answer(numbers, [False] * self.digits)
        prompt = "".join(map(str, numbers)) + "="
        return {"prompt": prompt, "answer": reasoning[-1], "reasoning": reasoning}

    def _draw(self, index: int) -> tuple[list[int], np.random.Generator]:
        rng = np.random.default_rng([self.seed, index])
        return rng.integers(0, 10, size=self.digits).tolist(), rng


class ResidueTraces(Residues):
    """Adds ``completion``: reasoning that leaves out each digit with probability ``slip``.

    Args:
        size: number of problems.
        seed: seed of the problems and of the digits that are left out.
        digits: length of the sum.
        slip: probability that a digit is left out.
    """

    def __init__(self, size: int = 4096, seed: int = 0, digits: int = 4, slip: float = 0.0) -> None:
        super().__init__(size, seed, digits)
        self.slip = slip

    def __getitem__(self, index: int) -> dict[str, str]:
        numbers, rng = self._draw(index)
        skip = [bool(draw < self.slip) for draw in rng.random(self.digits)]
        return {**super().__getitem__(index), "completion": worked_answer(numbers, skip)}


def answer_reward(sample: Sample) -> float:
    """Return 1 if the text after the only ``#`` is the answer, whatever stands before it."""
    right = sample.text.partition("#")[2] == sample.row["answer"]
    return float(sample.text.count("#") == 1 and right)


def reasoning_reward(sample: Sample) -> float:
    """Return 1 if every residue is right."""
    return float(sample.text == sample.row["reasoning"])
