"""The answer of a completion, as majority@k compares it."""

from __future__ import annotations

from kdrl_lightning.rewards.base import Reward, Sample


def answer_of(reward: Reward, sample: Sample) -> str | None:
    """Return what the reward takes as the completion's answer; None where it finds none.

    A reward says so by a method ``answer(sample) -> str | None``: the extraction that its verdict
    is based on. A failing one finds none. Without the method the answer is the completion's whole
    text, less white space around it: where there is reasoning in it, hardly two are equal, and
    majority@k is no more than pass@1.
    """
    extract = getattr(reward, "answer", None)
    if not callable(extract):
        return sample.text.strip()
    try:
        found = extract(sample)
    except Exception:
        return None
    return None if found is None else str(found)
