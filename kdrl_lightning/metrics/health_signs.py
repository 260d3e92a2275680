"""Signs that a self-teacher does harm, read from the numbers of a run's rollouts.

Each sign is a function of the rows so far, one per rollout, and returns a line with the figure and
the cure, or None. The failures are those of published runs; the limits are our choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TypeAlias

Rows: TypeAlias = Sequence[Mapping[str, float]]
Sign: TypeAlias = Callable[[Rows, int], str | None]

LEAKS = 0.02  # share of completions
LEVEL = 0.9  # of the first level: a KL that stays above this share counts as flat
SURE = 0.05  # nats per token
LOST = 2 / 3  # of the first level, which lengths and hedging words both fall below
LOOPS = 0.2  # share of n-grams, above the first level
DROP = 0.02  # of held-out pass@k


def levels(rows: Rows, name: str, window: int) -> tuple[float, float] | None:
    """Return a number's means over the first and the last ``window`` rollouts that have it.

    None if fewer than ``2 * window`` rollouts have it.

    >>> levels([{"x": 1.0}, {"x": 3.0}, {}, {"x": 4.0}, {"x": 6.0}], "x", window=2)
    (2.0, 5.0)
    >>> levels([{"x": 1.0}] * 3, "x", window=2) is None
    True
    """
    values = [row[name] for row in rows if name in row]
    if len(values) < 2 * window:
        return None
    return fmean(values[:window]), fmean(values[-window:])


def leakage(rows: Rows, window: int) -> str | None:
    """Completions refer to a solution that only the teacher sees (arXiv 2604.03128)."""
    values = [row["health/leak_frac"] for row in rows if "health/leak_frac" in row][-window:]
    if len(values) < window or fmean(values) <= LEAKS:
        return None
    return (
        f"{fmean(values):.1%} of the completions of the last {window} rollouts refer to a solution "
        "or hint that their prompt does not contain: the student learns to act as if it saw the "
        "teacher's context. Show the teacher less, e.g. the answer instead of the solution, or "
        "lower `teacher_kl_coef`."
    )


def flat_kl(rows: Rows, window: int) -> str | None:
    """The KL to the teacher stays at its first level (arXiv 2604.03128)."""
    found = levels(rows, "kd/reverse_kl", window)
    if found is None or found[0] <= 0.0 or found[1] < LEVEL * found[0]:
        return None
    return (
        f"`kd/reverse_kl` was {found[0]:.3g} nats in the first {window} rollouts and is "
        f"{found[1]:.3g} in the last {window}: the student stops approaching the teacher, whose "
        "context it cannot see. Show the teacher less, train on the reward too (RLSD, SRPO), or "
        "end the run here."
    )


def sure_teacher(rows: Rows, window: int) -> str | None:
    """The teacher is nearly certain of each token: it dictates one answer (arXiv 2601.20802)."""
    teacher, student = (levels(rows, n, window) for n in ("kd/teacher_entropy", "policy/entropy"))
    if teacher is None or student is None or teacher[1] >= min(SURE, student[1] / 2):
        return None
    return (
        f"the teacher's entropy is {teacher[1]:.3g} nats per token in the last {window} rollouts, "
        f"the student's {student[1]:.3g}: the context reveals every token. Show the teacher less, "
        "e.g. the answer instead of the solution, and not the completion's own text."
    )


def lost_hedging(rows: Rows, window: int) -> str | None:
    """Lengths and hedging words fall together (arXiv 2603.24472)."""
    words = levels(rows, "health/hedges_mean", window)
    tokens = levels(rows, "rollout/length_mean", window)
    if words is None or tokens is None or words[0] <= 0.0:
        return None
    if words[1] > LOST * words[0] or tokens[1] > LOST * tokens[0]:
        return None
    return (
        f"completions have {words[1]:.3g} hedging words and {tokens[1]:.0f} tokens, while the "
        f"first {window} rollouts had {words[0]:.3g} and {tokens[0]:.0f}: the student learns the "
        "teacher's certainty and stops checking itself. Watch held-out accuracy; keep the initial "
        "weights as the teacher, lower `teacher_kl_coef`, or use more prompts."
    )


def loops(rows: Rows, window: int) -> str | None:
    """Completions repeat themselves, which a moving teacher agrees with (arXiv 2603.25562)."""
    found = levels(rows, "health/repeat_frac", window)
    if found is None or found[1] - found[0] <= LOOPS:
        return None
    return (
        f"{found[1]:.1%} of the n-grams of the completions repeat earlier ones, while the first "
        f"{window} rollouts had {found[0]:.1%}: student and teacher drift into loops together. Use "
        "a slower teacher (a smaller `student_weight`, or InitialWeights), from an earlier "
        "checkpoint."
    )


def falling_pass(validations: Rows, window: int) -> str | None:
    """Held-out pass@k falls while the training reward rises (arXiv 2603.24472).

    Args:
        validations: one row per validation: ``pass`` (pass@k), ``k``, and ``reward``, the training
            reward.
        window: unused; two validations below the best one are enough.
    """
    if len(validations) < 3:
        return None
    best, now = max(validations, key=lambda row: row["pass"]), validations[-1]
    below = all(row["pass"] < best["pass"] - DROP for row in validations[-2:])
    if not below or now["reward"] <= best["reward"]:
        return None
    return (
        f"held-out pass@{now['k']:.0f} fell from {best['pass']:.3g} to {now['pass']:.3g} while the "
        f"training reward rose from {best['reward']:.3g} to {now['reward']:.3g}: the student "
        "learns only what the teacher shows. Go back to the best checkpoint, and use more prompts "
        "or a smaller `teacher_kl_coef`."
    )


SIGNS: dict[str, Sign] = {
    "leakage": leakage,
    "flat KL": flat_kl,
    "sure teacher": sure_teacher,
    "lost hedging": lost_hedging,
    "loops": loops,
}
