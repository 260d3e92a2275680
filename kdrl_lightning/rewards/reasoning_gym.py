"""reasoning-gym's own scorers, behind a strict extraction of the answer."""

from __future__ import annotations

from typing import Any

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.optional import load_library
from kdrl_lightning.rewards.answers import after_marker, last_tagged
from kdrl_lightning.rewards.base import Sample, TaskReward, Verdict

NONSENSE = "no answer at all"


class ReasoningGymReward(TaskReward):
    """The score of the row's task for the answer; correct is what gets the full score.

    The answer is what stands between the last ``<answer>`` tags, or follows the last marker; a
    completion without is wrong. Never the whole completion: many scorers give credit to any text
    that contains the answer.

    Args:
        marker: what stands before the answer; None: it is in ``<answer>`` tags.
        task: whose scorer; None: the row's ``metadata.source_dataset``, which
            ``ReasoningGymPrompts`` writes.
        partial: keep the scorer's partial credit; else that is 0.
    """

    def __init__(
        self, marker: str | None = None, task: str | None = None, partial: bool = False
    ) -> None:
        self.marker = marker
        self.task = task
        self.partial = partial
        self._scorers: dict[str, Any] = {}
        if task is not None:
            load_scorer(task)

    def __call__(self, sample: Sample) -> Verdict:
        """Judge one sample."""
        row = dict(sample.row)
        score = self._scorer(self.task or str(row["metadata"]["source_dataset"]), row)
        text, marker = sample.text, self.marker
        answer = last_tagged(text, "answer") if marker is None else after_marker(text, marker)
        if not answer:
            return Verdict(0.0, False)
        try:
            value = float(score(answer, row))
        except Exception:
            # Some scorers raise at an answer that they cannot read; the right one they must.
            if row.get("answer") is not None:
                score(str(row["answer"]), row)
            value = 0.0
        correct = value >= 1.0
        return Verdict(value if self.partial else float(correct), correct)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scorers": {}}

    def _scorer(self, task: str, row: dict[str, Any]) -> Any:
        if task not in self._scorers:
            score = load_scorer(task)
            if _accepts_nonsense(score, row):  # as game_of_life_halting does in 0.1.25
                raise ConfigurationError(
                    f"`task` must have a scorer that tells right from wrong: got {task}, which "
                    f"accepts {NONSENSE!r}."
                )
            self._scorers[task] = score
        return self._scorers[task]


def _accepts_nonsense(score: Any, row: dict[str, Any]) -> bool:
    try:
        return float(score(NONSENSE, row)) >= 1.0
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
