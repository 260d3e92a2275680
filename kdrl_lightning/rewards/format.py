"""Whether a completion thinks first and answers then."""

from __future__ import annotations

from kdrl_lightning.rewards.answers.extraction import in_think_format, last_tagged
from kdrl_lightning.rewards.base import Sample, TaskReward


class FormatReward(TaskReward):
    """1 for ``<think>...</think> <answer>...</answer>``, else 0.

    Each tag once, in this order, nothing before, between or behind but white space.

    Args:
        opened: the prompt ends with ``<think>``, as some chat templates do it; the completion then
            must not open it again.

    >>> FormatReward()(Sample("<think>6*7</think><answer>42</answer>", [], {}))
    1.0
    """

    def __init__(self, opened: bool = False) -> None:
        self.opened = opened

    def __call__(self, sample: Sample) -> float:
        """Judge one sample."""
        return float(in_think_format(sample.text, self.opened))

    def answer(self, sample: Sample) -> str | None:
        """Return what stands in the answer's tags; None where the format is wrong."""
        formed = in_think_format(sample.text, self.opened)
        return last_tagged(sample.text, "answer") if formed else None
