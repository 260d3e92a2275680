"""A reward that compares mathematical answers, with math-verify in processes that can be killed."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any
from unicodedata import normalize

from kdrl_lightning.common.untyped import Row
from kdrl_lightning.errors import ConfigurationError, load_library
from kdrl_lightning.rewards.answers.equations import EQUALS, contradicts, numeric_sides
from kdrl_lightning.rewards.answers.extraction import after_marker, last_boxed
from kdrl_lightning.rewards.answers.numbers import same_number
from kdrl_lightning.rewards.answers.references import accepted, list_as_text, shorten
from kdrl_lightning.rewards.answers.units import same_quantity
from kdrl_lightning.rewards.base import BatchReward, Sample, Verdict
from kdrl_lightning.rewards.processes.workers import WorkerPool

# `Any`: math-verify and sympy have no types.

# Longer answers count as wrong: no task needs them, and parsers take very long to read them.
LONGEST_ANSWER = 1000
INTEGER = re.compile(r"[+-]?\d{1,18}")
WORDS = re.compile(r"[A-Za-z][A-Za-z ]*")
# math-verify builds its parsers at their first use, which takes longer than all later calls.
WARM_UP = [(r"\frac{1}{2}", "0.5"), ("x+1", r"1+\sqrt{x^2}"), ("(1, 2)", r"\{1, 2\}")]
# math-verify reads 1e-9 as e - 9.
E_NOTATION = re.compile(r"(?<![A-Za-z\\\d.])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d+)(?!\w)")
RELATIVE = 5e-6  # the relative error of 0.1 after rounding to six places
# Symbols that people type, and their LaTeX.
SYMBOLS = str.maketrans(
    {"²": "^2", "³": "^3", "⁄": "/", "°": r"^\circ ", "×": r"\times "}
    | {"·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge "}
    | {"−": "-"}
    # Fractions and full-width characters.
    | {c: " " + normalize("NFKC", c).replace("⁄", "/") for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
    | {c: normalize("NFKC", c) for c in "０１２３４５６７８９．，％＋－／＝（）"}
)
ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+|[A-Za-z]))")
LIST_OF_ONE = re.compile(r"\[[^,\s]+,?\]")
STYLE = re.compile(
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|boldsymbol|bm|mbox)\s*\{([^{}]*)\}"
)
CHOICE = re.compile(r"(?<![A-Za-z])([A-Z])\s*[).:](?!\d)")
# LaTeX's delimiters of a formula around a whole answer.
AROUND = re.compile(r"\\\[(.*)\\\]|\\\((.*)\\\)", re.S)
# LaTeX's spaces after an answer; a final `\ ` has lost its space to `strip`.
TRAILING = re.compile(r"(?<=\S)(?:\s|~|\\[,;:!]|\\quad|\\ |\\$)+$")


class MathReward(BatchReward):
    r"""Give 1 if the answer equals a reference answer of the row mathematically, else 0.

    The answer is the content of the last ``\boxed{...}``, or the rest of the line after the last
    marker; a completion without one is wrong. The reference is extracted in the same way if it has
    a box or the marker; otherwise the whole text counts. Numbers are compared exactly: ``5\%`` is
    0.05, ``1.6e-19`` is not ``9.1e-31``; a decimal equals 1/3 if it has at least six places. Words
    are compared as words. math-verify compares everything else, in worker processes: a comparison
    that hangs is killed and fails with ``TimeoutError`` (``RewardRunner`` handles failures).

    Args:
        marker: text before the answer, e.g. ``####``; None: the answer is boxed.
        answer_column: the row's column with the reference answer.
        time_limit_s: time limit of one comparison, in seconds.
        workers: number of worker processes.
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
        """Judge several samples; each distinct pair of reference and answer is compared once."""
        results: list[float | Verdict | Exception] = [0.0] * len(samples)
        hard: dict[tuple[str, str], list[int]] = {}
        for i, sample in enumerate(samples):
            try:
                golds = self.references(sample.row)
            except Exception as error:
                results[i] = error
                continue
            answer = self.given(sample.text)
            if answer is None:
                continue
            known = [equal_at_once(gold, answer) for gold in golds]
            if any(known):
                results[i] = 1.0
                continue
            for gold, unequal in zip(golds, known, strict=True):
                if unequal is None:
                    hard.setdefault((gold, answer), []).append(i)
        for pair, result in zip(hard, self.pool.map(list(hard)), strict=True):
            for i in hard[pair]:
                if results[i] != 1.0:  # else another accepted answer is equal
                    results[i] = result if isinstance(result, Exception) else float(result)
        return results

    def check(self, row: Row) -> None:
        """Check that the row has an answer."""
        self.references(row)

    def list_as_text(self, row: Row) -> str | None:
        """Return the answer if it is a list as text, and cannot be an interval, set or vector."""
        found = list_as_text(row, self.answer_column)
        several = found and not set("'\"") & set(found) and not LIST_OF_ONE.fullmatch(found)
        return None if several else found

    def answer(self, sample: Sample) -> str | None:
        """Return the answer that votes in majority@k, with integers and words normalised.

        Votes are compared as texts: 1/2 and 0.5 are two answers, both of which may be right.
        """
        given = self.given(sample.text)
        if given is None or INTEGER.fullmatch(given):
            return given and str(int(given))
        word = _plain(given)
        if not WORDS.fullmatch(word):
            return given
        return word if len(word) == 1 else word.lower()

    def given(self, text: str) -> str | None:
        """Return a completion's answer; None if there is none, or it has over 1000 characters."""
        found = last_boxed(text) if self.marker is None else after_marker(text, self.marker)
        if found is None:
            return None
        found = _bare(found if self.marker is None else found.split("\n", 1)[0])
        return found if 0 < len(found) <= LONGEST_ANSWER else None

    def references(self, row: Row) -> list[str]:
        """Return the answers that a row accepts; see ``accepted``.

        Raises:
            KeyError: the row has no ``answer_column``.
            ConfigurationError: the row has no answer.
        """
        golds = [self._cut(text) for text in accepted(row, self.answer_column)]
        if not any(golds):
            raise ConfigurationError(
                f"a row must have an answer, but its `{self.answer_column}` is empty: got none "
                f"in the row {shorten(row)}. Add the answer, or remove the row."
            )
        return list(dict.fromkeys(gold for gold in golds if gold))

    def _cut(self, whole: str) -> str:
        boxed = last_boxed(whole) if self.marker is None else None
        marked = None if self.marker is None else after_marker(whole, self.marker)
        return _bare(next(text for text in (boxed, marked, whole) if text is not None))

    def start(self) -> None:
        """Start a worker process and check one comparison.

        Raises:
            ConfigurationError: math-verify is not installed, or does not work.
        """
        (result,) = self.pool.map([("x+1", "1+x")])
        if result is not True:
            raise ConfigurationError(
                f"`math_verify` must find x+1 equal to 1+x: got {result!r}. Reinstall it: pip "
                "install 'kdrl_lightning[tasks]'."
            )

    def close(self) -> None:
        """Stop the worker processes."""
        self.pool.close()


def equal_at_once(gold: str, answer: str) -> bool | None:
    """Compare two answers without a parser; return None if only a parser can decide.

    >>> equal_at_once("72", "072"), equal_at_once("yes", "No"), equal_at_once("1/2", "0.5")
    (True, False, True)
    >>> equal_at_once("x+1", "1+x"), equal_at_once("5", "x=5"), equal_at_once("5", "3=5")
    (None, True, False)
    """
    if gold == answer:
        return True
    if INTEGER.fullmatch(gold) and INTEGER.fullmatch(answer):
        return int(gold) == int(answer)
    number = same_number(*(_plain(t) if STYLE.fullmatch(t) else t for t in (gold, answer)))
    quantity = same_quantity(gold, answer)
    if number is not None or quantity is not None:
        return number if number is not None else quantity
    word = _plain(gold)
    if WORDS.fullmatch(word):
        # A letter may be a symbol. A parser would read a word as a product of symbols.
        given = _plain(answer)
        if len(word) > 1:
            return given.lower() == word.lower()
        labels = CHOICE.findall(given)  # e.g. C in `(C) 5`
        return given == word or (labels == [word] and given.startswith(word))
    sides = numeric_sides(answer)
    if sides and contradicts(sides):
        return False
    if sides and not EQUALS.search(gold):
        known = [equal_at_once(gold, side) for side in sides]
        return False if False in known else None if None in known else True
    return None


def equal(pair: tuple[str, str]) -> bool:
    """Compare a (reference, answer) pair with math-verify; runs in a worker process.

    Raises:
        ValueError: math-verify cannot read the reference.
    """
    known = equal_at_once(*pair)
    if known is not None:
        return known
    sides = [] if EQUALS.search(pair[0]) else numeric_sides(pair[1])
    if sides:
        return all(equal((pair[0], side)) for side in sides)
    if ("%" in pair[0]) != ("%" in pair[1]):
        return False  # math-verify drops the sign
    math_verify = load_library("math_verify")
    logging.disable(logging.CRITICAL)  # math-verify logs every text that it cannot read

    def parsed(text: str) -> list[Any]:
        config = [math_verify.LatexExtractionConfig()]
        text = E_NOTATION.sub(r"\1\\times 10^{\2}", text)
        # No time limit of math-verify's, which uses signals; the worker process has one.
        found: list[Any] = math_verify.parse(f"${text}$", config, parsing_timeout=None)
        return found

    gold = parsed(pair[0])
    if not gold:
        raise ValueError(f"math-verify cannot read the reference {pair[0][:100]!r}")
    answer = parsed(pair[1])
    # An interval equals an inequality in either direction.
    same = math_verify.verify(gold, answer, timeout_seconds=None, allow_set_relation_comp=True)
    return bool(same) and alike(gold, answer)


def alike(gold: list[Any], answer: list[Any]) -> bool:
    """Check whether two parsed answers agree to six digits, and not only to six decimal places.

    Symbols get fixed values. What cannot be evaluated counts as equal: math-verify has decided.
    """
    ours, theirs = _values(gold[0]), _values(answer[0])
    if ours is None or theirs is None or len(ours) != len(theirs):
        return True
    return all(
        any(abs(a - b) <= RELATIVE * max(abs(a), abs(b)) for b in others)
        for some, others in ((ours, theirs), (theirs, ours))
        for a in some
    )


def _values(parsed: Any) -> list[complex] | None:
    """Evaluate an expression, or the entries of a tuple, a set or an interval."""
    kind = type(parsed).__name__
    if kind in ("Tuple", "FiniteSet", "Interval"):
        entries = [_values(entry) for entry in parsed.args[: 2 if kind == "Interval" else None]]
        return None if None in entries else [v for entry in entries for v in entry or ()]
    try:
        symbols = sorted(parsed.free_symbols, key=str)
        given = {symbol: 1.37 + 0.71 * i for i, symbol in enumerate(symbols)}
        value = complex(parsed.subs(given).evalf(20))
    except Exception:
        return None
    return [value] if abs(value) < float("inf") else None


def _bare(text: str) -> str:
    text = ROOT.sub(lambda found: rf"\sqrt{{{found[1] or found[2]}}}", text.translate(SYMBOLS))
    text = re.sub(r"\\varnothing(?![A-Za-z])", r"\\emptyset", text.strip(" \t\r\n*`"))
    found = AROUND.fullmatch(text)
    text = (found[1] or found[2] or "") if found else text
    text = TRAILING.sub("", text.strip().strip("$").strip())
    text = "-" + text[1:] if text.startswith("–") else text
    return text.rstrip(".").strip()


def _plain(text: str) -> str:
    return STYLE.sub(r"\1", text).strip("() ").strip()
