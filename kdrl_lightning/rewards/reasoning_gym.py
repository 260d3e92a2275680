"""A reward that extracts the answer strictly and scores it with reasoning-gym's scorers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from kdrl_lightning.common.untyped import Row
from kdrl_lightning.errors import ConfigurationError, load_library
from kdrl_lightning.rewards.answers.extraction import after_marker, last_tagged
from kdrl_lightning.rewards.answers.references import accepted, missing
from kdrl_lightning.rewards.base import BatchReward, Sample, Verdict
from kdrl_lightning.rewards.processes.workers import WorkerPool

# `Any`: reasoning-gym's scorers have no types.

# Constant answers that a student would learn if a scorer gave them full credit for any question.
CONSTANTS = (
    *("no answer at all", "nan", "nan+nanj", "inf", "-inf", "1e999", "0", "1", "-1", "x", "?"),
    *("None", "True", "False", "yes", "no", "[]", "{}", "()", "."),
)
PROBE_ROWS, PROBE_SEED = 12, 314159
WARM_UP = [("chain_sum", "1", {"answer": "1"})]  # imports the library


class ReasoningGymReward(BatchReward):
    """Score the answer with the scorer of the row's task; a full score counts as correct.

    The answer is the text between the last ``<answer>`` tags, or after the last marker; a
    completion without one is wrong. The scorer never sees the whole completion, because many
    scorers give credit to any text that contains the answer. Scorers run in worker processes,
    because some evaluate the answer as an expression.

    Args:
        marker: text before the answer; None: the answer is in ``<answer>`` tags.
        task: name of the reasoning-gym task; None: the row's ``metadata.source_dataset``, which
            ``ReasoningGymPrompts`` writes.
        partial: keep the scorer's partial credit; otherwise only a full score is rewarded.
        time_limit_s: time limit of one scoring, in seconds.
        workers: number of worker processes.
    """

    def __init__(
        self,
        marker: str | None = None,
        task: str | None = None,
        partial: bool = False,
        time_limit_s: float = 5.0,
        workers: int = 4,
    ) -> None:
        self.marker = marker
        self.task = task
        self.partial = partial
        self.pool = WorkerPool(score, time_limit_s, workers, WARM_UP)
        self._probed: set[str] = set()

    def judge(self, samples: Sequence[Sample]) -> list[float | Verdict | Exception]:
        """Judge several samples in the worker processes."""
        return [self._verdict(value) for value in self.pool.map([self._asked(s) for s in samples])]

    def answer(self, sample: Sample) -> str | None:
        """Return the text between the tags or after the marker; None if they are missing."""
        if self.marker is None:
            return last_tagged(sample.text, "answer")
        return after_marker(sample.text, self.marker)

    def check(self, row: Row) -> None:
        """Try constant answers and the right one on the first row of each task.

        Raises:
            ConfigurationError: the task's scorer gives full credit to a constant on most rows, or
                not to the answer of the row.
        """
        task = self.task or str(row["metadata"]["source_dataset"])
        if task in self._probed:
            return
        self._probed.add(task)
        for result in self.pool.map([(task, constant, dict(row)) for constant in CONSTANTS]):
            if isinstance(result, ConfigurationError):
                raise result
        if missing(row.get("answer")):  # some tasks have several right answers and name none
            return
        right = accepted(row)
        found = self.pool.map([(task, text, dict(row)) for text in right])
        if found and not any(isinstance(credit, float) and credit >= 1.0 for credit in found):
            raise ConfigurationError(
                f"the scorer of {task} must give full credit to the answer of the row: got "
                f"{found[0]} for {right[0]!r:.60}. Use ReasoningGymPrompts: files change the "
                "`metadata` of some tasks (tuples become lists)."
            )

    def close(self) -> None:
        """Stop the worker processes."""
        self.pool.close()

    def _asked(self, sample: Sample) -> tuple[str | None, str | None, Row]:
        return self.task, self.answer(sample), dict(sample.row)

    def _verdict(self, value: float | Exception) -> Verdict | Exception:
        if isinstance(value, Exception):
            return value
        correct = value >= 1.0
        return Verdict(value if self.partial else float(correct), correct)


def score(asked: tuple[str | None, str | None, Row]) -> float:
    """Score a (task, answer, row) triple; runs in a worker process.

    Raises:
        ConfigurationError: reasoning-gym has no such task, or the task's scorer gives this constant
            answer full credit for most questions.
    """
    task, answer, row = asked
    task = task or str(row["metadata"]["source_dataset"])
    scorer = load_scorer(task)
    if not answer:
        return 0.0
    best = max(_credit(scorer, answer, one) for one in _with_each_answer(row))
    if best >= 1.0 and answer in CONSTANTS and always_right(task, answer):
        # In reasoning-gym 0.1.25, game_of_life_halting accepts any text, complex_arithmetic nan.
        raise ConfigurationError(
            f"`task` must have a scorer that rejects wrong answers: got {task}, whose scorer in "
            f"reasoning-gym gives {answer!r} full credit for most questions. Choose another task, "
            "or write a reward for it."
        )
    return best


def _with_each_answer(row: Row) -> list[Row]:
    """Return one copy of the row per accepted answer, as text; scorers cannot read other types."""
    if isinstance(row.get("answer"), str) or missing(row.get("answer")):
        return [row]
    return [{**row, "answer": text} for text in accepted(row)]


def _credit(scorer: Any, answer: str, row: Row) -> float:
    try:
        return float(scorer(answer, row))
    except Exception:
        # Some scorers raise if they cannot read an answer; not being able to read the right one is
        # a failure.
        if row.get("answer") is not None:
            scorer(str(row["answer"]), row)
        return 0.0


@cache
def always_right(task: str, answer: str) -> bool:
    """Check whether a scorer gives one answer full credit on most rows, whose answers differ."""
    scorer = load_scorer(task)
    items = load_library("reasoning_gym").create_dataset(task, size=PROBE_ROWS, seed=PROBE_SEED)
    satisfied: list[Any] = []
    for row in (items[i] for i in range(PROBE_ROWS)):
        with suppress(Exception):  # the scorer cannot read the answer
            if float(scorer(answer, row)) >= 1.0:
                satisfied.append(row.get("answer") or len(satisfied))
    return len(satisfied) > PROBE_ROWS / 2 and len(set(map(str, satisfied))) > 1


@cache
def load_scorer(task: str) -> Any:
    """Return a task's scoring function.

    Raises:
        ConfigurationError: reasoning-gym has no such task, or is not installed.
    """
    factory = load_library("reasoning_gym.factory")
    load_library("reasoning_gym")  # fills the factory
    if task not in factory.DATASETS:
        raise ConfigurationError(
            f"`task` must be a task of reasoning-gym: got {task}. Choose one of its data sets, "
            "e.g. chain_sum."
        )
    return factory.get_score_answer_fn(task)
