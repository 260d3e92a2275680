"""reasoning-gym's own scorers, behind a strict extraction of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.optional import load_library
from kdrl_lightning.rewards.answers import after_marker, last_tagged
from kdrl_lightning.rewards.base import BatchReward, Sample, Verdict
from kdrl_lightning.rewards.workers import WorkerPool

NONSENSE = "no answer at all"
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

    def judge(self, samples: Sequence[Sample]) -> list[float | Verdict | Exception]:
        """Judge many."""
        return [self._verdict(value) for value in self.pool.map([self._asked(s) for s in samples])]

    def answer(self, sample: Sample) -> str | None:
        """Return what stands between the tags or behind the marker; None without them."""
        if self.marker is None:
            return last_tagged(sample.text, "answer")
        return after_marker(sample.text, self.marker)

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
        ConfigurationError: there is no such task, or its scorer accepts anything.
    """
    task, answer, row = asked
    scorer = trusted_scorer(task or str(row["metadata"]["source_dataset"]), row)
    if not answer:
        return 0.0
    try:
        return float(scorer(answer, row))
    except Exception:
        # Some scorers raise at an answer that they cannot read; the right one they must.
        if row.get("answer") is not None:
            scorer(str(row["answer"]), row)
        return 0.0


_trusted: dict[str, Any] = {}


def trusted_scorer(task: str, row: dict[str, Any]) -> Any:
    """Return a task's scorer, if nonsense does not satisfy it.

    Raises:
        ConfigurationError: there is no such task, or it does.
    """
    if task not in _trusted:
        scorer = load_scorer(task)
        if _accepts_nonsense(scorer, row):  # as game_of_life_halting's does in 0.1.25
            raise ConfigurationError(
                f"`task` must have a scorer that tells right from wrong: got {task}, which "
                f"accepts {NONSENSE!r}."
            )
        _trusted[task] = scorer
    return _trusted[task]


def _accepts_nonsense(scorer: Any, row: dict[str, Any]) -> bool:
    try:
        return float(scorer(NONSENSE, row)) >= 1.0
    except Exception:  # cannot read it, which is as well
        return False


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
