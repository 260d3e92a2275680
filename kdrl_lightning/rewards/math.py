"""Mathematics, judged by math-verify in processes that can be killed."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.optional import load_library
from kdrl_lightning.rewards.answers import after_marker, last_boxed
from kdrl_lightning.rewards.base import BatchReward, Sample, Verdict
from kdrl_lightning.rewards.workers import WorkerPool

# Longer answers are wrong: nobody asks for them, and parsers take their time over them.
LONGEST_ANSWER = 1000
INTEGER = re.compile(r"[+-]?\d{1,18}")
WORDS = re.compile(r"[A-Za-z][A-Za-z ]*")
# Parsers are built at their first use, which takes longer than all others.
WARM_UP = [(r"\frac{1}{2}", "0.5"), ("x+1", r"1+\sqrt{x^2}"), ("(1, 2)", r"\{1, 2\}")]
STYLE = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")


class MathReward(BatchReward):
    r"""1 if the answer equals the reference as mathematics, else 0.

    The answer is the content of the last ``\boxed{...}``, or what follows the last marker on its
    line; a completion without one is wrong, whatever else it says. The reference is cut in the same
    way where it has a box or the marker, else taken whole. Equal texts and integers are compared at
    once; words as words; all else by math-verify, in other processes: what hangs there is killed
    and fails with ``TimeoutError`` (see ``RewardRunner`` for what a failure gets).

    Args:
        marker: what stands before the answer, e.g. ``####``; None: the answer is boxed.
        answer_column: the row's column with the reference.
        time_limit_s: of one comparison.
        workers: processes that compare.
    """

    def __init__(
        self,
        marker: str | None = None,
        answer_column: str = "answer",
        time_limit_s: float = 5.0,
        workers: int = 4,
    ) -> None:
        self.marker = marker
        self.answer_column = answer_column
        self.pool = WorkerPool(equal, time_limit_s, workers, WARM_UP)

    def judge(self, samples: Sequence[Sample]) -> list[float | Verdict | Exception]:
        """Judge many; each pair of reference and answer once."""
        results: list[float | Verdict | Exception] = [0.0] * len(samples)
        hard: dict[tuple[str, str], list[int]] = {}
        for i, sample in enumerate(samples):
            try:
                gold = self.reference(sample)
            except Exception as error:
                results[i] = error
                continue
            answer = self.given(sample.text)
            if answer is None:
                continue
            known = equal_at_once(gold, answer)
            if known is None:
                hard.setdefault((gold, answer), []).append(i)
            else:
                results[i] = float(known)
        for pair, result in zip(hard, self.pool.map(list(hard)), strict=True):
            for i in hard[pair]:
                results[i] = result if isinstance(result, Exception) else float(result)
        return results

    def answer(self, sample: Sample) -> str | None:
        """Return the answer that votes: texts that ``equal_at_once`` finds equal are one.

        Nothing else is compared here: 1/2 and 0.5 are two answers, both of which may be right.
        """
        given = self.given(sample.text)
        if given is None or INTEGER.fullmatch(given):
            return given and str(int(given))
        word = _plain(given)
        if not WORDS.fullmatch(word):
            return given
        return word if len(word) == 1 else word.lower()

    def given(self, text: str) -> str | None:
        """Return a completion's answer; None without one, or with one of absurd length."""
        found = last_boxed(text) if self.marker is None else after_marker(text, self.marker)
        if found is None:
            return None
        found = _bare(found if self.marker is None else found.split("\n", 1)[0])
        return found if 0 < len(found) <= LONGEST_ANSWER else None

    def reference(self, sample: Sample) -> str:
        """Return the row's answer; one that is empty is an error."""
        whole = str(sample.row[self.answer_column])
        boxed = last_boxed(whole) if self.marker is None else None
        marked = None if self.marker is None else after_marker(whole, self.marker)
        gold = _bare(next(text for text in (boxed, marked, whole) if text is not None))
        if not gold:
            raise ValueError(f"`{self.answer_column}` is empty")
        return gold

    def start(self) -> None:
        """Start the processes, and let one compare.

        Raises:
            ConfigurationError: math-verify is not installed, or does not work.
        """
        (result,) = self.pool.map([("1/2", "0.5")])
        if result is not True:
            raise ConfigurationError(f"`math_verify` must find 1/2 equal to 0.5: got {result!r}.")

    def close(self) -> None:
        """End the processes."""
        self.pool.close()


def equal_at_once(gold: str, answer: str) -> bool | None:
    """Compare what needs no parser; None for all else.

    >>> equal_at_once("72", "072"), equal_at_once("yes", "No"), equal_at_once("1/2", "0.5")
    (True, False, None)
    """
    if gold == answer:
        return True
    if INTEGER.fullmatch(gold) and INTEGER.fullmatch(answer):
        return int(gold) == int(answer)
    word = _plain(gold)
    if WORDS.fullmatch(word):
        # A letter may be a symbol; to a parser a word is a product of symbols, in any order.
        given = _plain(answer)
        return given == word if len(word) == 1 else given.lower() == word.lower()
    return None


def equal(pair: tuple[str, str]) -> bool:
    """Compare reference and answer by math-verify; runs in a worker.

    Raises:
        ValueError: math-verify cannot read the reference.
    """
    math_verify = load_library("math_verify")
    logging.disable(logging.CRITICAL)  # of what it cannot read

    def parsed(text: str) -> list[Any]:
        config = [math_verify.LatexExtractionConfig()]
        # Its own time-outs use signals.
        found: list[Any] = math_verify.parse(f"${text}$", config, parsing_timeout=None)
        return found

    gold = parsed(pair[0])
    if not gold:
        raise ValueError(f"math-verify cannot read the reference {pair[0][:100]!r}")
    return bool(math_verify.verify(gold, parsed(pair[1]), timeout_seconds=None))


def _bare(text: str) -> str:
    return text.strip().strip("$").rstrip(".").strip()


def _plain(text: str) -> str:
    return STYLE.sub(r"\1", text).strip("() ").strip()
