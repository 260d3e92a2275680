"""reasoning-gym's own scorers, behind a strict extraction of the answer."""

from __future__ import annotations

from typing import Any

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.optional import load_library
from kdrl_lightning.rewards.answers import after_marker, last_tagged
from kdrl_lightning.rewards.base import Sample, TaskReward, Verdict


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
            self._scorer(task)

    def __call__(self, sample: Sample) -> Verdict:
        """Judge one sample."""
        task = self.task or str(sample.row["metadata"]["source_dataset"])
        scorer = self._scorer(task)
        text, marker = sample.text, self.marker
        answer = last_tagged(text, "answer") if marker is None else after_marker(text, marker)
        if not answer:
            return Verdict(0.0, False)
        try:
            score = float(scorer(answer, dict(sample.row)))
        except Exception as error:
            # Some scorers raise at an answer that they cannot read; the right one they must.
            if float(scorer(str(sample.row["answer"]), dict(sample.row))) < 1.0:
                raise RuntimeError(f"the scorer of {task} does not work: {error}") from error
            score = 0.0
        correct = score >= 1.0
        return Verdict(score if self.partial else float(correct), correct)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scorers": {}}

    def _scorer(self, task: str) -> Any:
        if task not in self._scorers:
            self._scorers[task] = load_scorer(task)
        return self._scorers[task]


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
