"""A reward for completions that think first and then answer, in tags."""

from __future__ import annotations

from kdrl_lightning.rewards.answers.extraction import in_think_format, last_tagged
from kdrl_lightning.rewards.base import Sample, TaskReward


class FormatReward(TaskReward):
    """Give 1 for a completion of the form ``<think>...</think> <answer>...</answer>``, else 0.

    Each tag must occur once, in this order, with only white space before, between and after the
    two blocks.

    Args:
        opened: the prompt already ends with ``<think>``, as with some chat templates, so the
            completion must not open it again.

    >>> FormatReward()(Sample("<think>6*7</think><answer>42</answer>", [], {}))
    1.0
    """

    def __init__(self, opened: bool = False) -> None:
        self.opened = opened

    def __call__(self, sample: Sample) -> float:
        """Judge one sample."""
        return float(in_think_format(sample.text, self.opened))

    def answer(self, sample: Sample) -> str | None:
        """Return the text between the answer tags; None if the format is wrong."""
        formed = in_think_format(sample.text, self.opened)
        return last_tagged(sample.text, "answer") if formed else None
