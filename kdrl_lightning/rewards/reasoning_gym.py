"""reasoning-gym's own scorers, behind a strict extraction of the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from kdrl_lightning.errors import ConfigurationError, load_library
from kdrl_lightning.rewards.answers.extraction import after_marker, last_tagged
from kdrl_lightning.rewards.answers.references import accepted, missing
from kdrl_lightning.rewards.base import BatchReward, Sample, Verdict
from kdrl_lightning.rewards.processes.workers import WorkerPool

# What a student would find if a scorer gave full credit to it, whatever the question.
CONSTANTS = (
    *("no answer at all", "nan", "nan+nanj", "inf", "-inf", "1e999", "0", "1", "-1", "x", "?"),
    *("None", "True", "False", "yes", "no", "[]", "{}", "()", "."),
)
PROBE_ROWS, PROBE_SEED = 12, 314159
WARM_UP = [("chain_sum", "1", {"answer": "1"})]  # imports the library


class ReasoningGymReward(BatchReward):
    """The score of the row's task for the answer; correct is what gets the full score.

    The answer is what stands between the last ``<answer>`` tags, or follows the last marker; a
    completion without is wrong. Never the whole completion: many scorers give credit to any text
    that contains the answer. Scorers run in other processes: some compute what they are
    given.

    Args:
        marker: what stands before the answer; None: it is in ``<answer>`` tags.
        task: whose scorer; None: the row's ``metadata.source_dataset``, which
            ``ReasoningGymPrompts`` writes.
        partial: keep the scorer's partial credit; else that is 0.
        time_limit_s: of one scoring.
        workers: processes that score.
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
        """Judge many."""
        return [self._verdict(value) for value in self.pool.map([self._asked(s) for s in samples])]

    def answer(self, sample: Sample) -> str | None:
        """Return what stands between the tags or behind the marker; None without them."""
        if self.marker is None:
            return last_tagged(sample.text, "answer")
        return after_marker(sample.text, self.marker)

    def check(self, row: Mapping[str, Any]) -> None:
        """Try constant answers on the first row of each task.

        Raises:
            ConfigurationError: the task's scorer gives full credit to one of them on most rows.
        """
        task = self.task or str(row["metadata"]["source_dataset"])
        if task in self._probed:
            return
        self._probed.add(task)
        for result in self.pool.map([(task, constant, dict(row)) for constant in CONSTANTS]):
            if isinstance(result, ConfigurationError):
                raise result

    def close(self) -> None:
        """End the processes."""
        self.pool.close()

    def _asked(self, sample: Sample) -> tuple[str | None, str | None, dict[str, Any]]:
        return self.task, self.answer(sample), dict(sample.row)

    def _verdict(self, value: float | Exception) -> Verdict | Exception:
        if isinstance(value, Exception):
            return value
        correct = value >= 1.0
        return Verdict(value if self.partial else float(correct), correct)


def score(asked: tuple[str | None, str | None, dict[str, Any]]) -> float:
    """Score an answer; runs in a worker.

    Raises:
        ConfigurationError: there is no such task, or its scorer gives full credit to this answer
            whatever the question.
    """
    task, answer, row = asked
    task = task or str(row["metadata"]["source_dataset"])
    scorer = load_scorer(task)
    if not answer:
        return 0.0
    best = max(_credit(scorer, answer, one) for one in _with_each_answer(row))
    if best >= 1.0 and answer in CONSTANTS and always_right(task, answer):
        # As game_of_life_halting's does with any text, complex_arithmetic's with nan (0.1.25).
        raise ConfigurationError(
            f"`task` must have a scorer that tells right from wrong: got {task}, whose scorer in "
            f"reasoning-gym gives full credit to {answer!r} whatever the answer is. Choose another "
            "task, or judge its answers with a reward of your own."
        )
    return best


def _with_each_answer(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the row once for each accepted answer; scorers read texts, and some need none."""
    if isinstance(row.get("answer"), str) or missing(row.get("answer")):
        return [row]
    return [{**row, "answer": text} for text in accepted(row)]


def _credit(scorer: Any, answer: str, row: dict[str, Any]) -> float:
    try:
        return float(scorer(answer, row))
    except Exception:
        # Some scorers raise at an answer that they cannot read; the right one they must.
        if row.get("answer") is not None:
            scorer(str(row["answer"]), row)
        return 0.0


@cache
def always_right(task: str, answer: str) -> bool:
    """Whether a task's scorer gives full credit to an answer on most rows, whose answers differ."""
    scorer = load_scorer(task)
    items = load_library("reasoning_gym").create_dataset(task, size=PROBE_ROWS, seed=PROBE_SEED)
    satisfied: list[Any] = []
    for row in (items[i] for i in range(PROBE_ROWS)):
        with suppress(Exception):  # it cannot read the answer
            if float(scorer(answer, row)) >= 1.0:
                satisfied.append(row.get("answer") or len(satisfied))
    return len(satisfied) > PROBE_ROWS / 2 and len(set(map(str, satisfied))) > 1


@cache
def load_scorer(task: str) -> Any:
    """Return a task's scorer.

    Raises:
        ConfigurationError: there is no such task, or reasoning-gym is not installed.
    """
    factory = load_library("reasoning_gym.factory")
    load_library("reasoning_gym")  # fills the factory
    if task not in factory.DATASETS:
        raise ConfigurationError(f"`task` must be one of reasoning-gym's: got {task}.")
    return factory.get_score_answer_fn(task)
