"""Extracts the last answer of a completion, in one pass over the text."""

from __future__ import annotations

import re
import warnings

from kdrl_lightning.rewards.base import Reward, Sample, own_copy

BOXES = ("\\boxed", "\\fbox")


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}``; None if it is missing or not closed.

    >>> last_boxed(r"\boxed{41} or \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    start = max(text.rfind(box + "{") for box in BOXES)
    if start < 0:
        return None
    start = text.index("{", start) + 1
    depth, escaped = 1, False
    for i in range(start, len(text)):
        char = text[i]
        if escaped or char == "\\":
            escaped = not escaped  # \{ and \} do not open or close a group
        elif char in "{}":
            depth += 1 if char == "{" else -1
            if not depth:
                return text[start:i].strip()
    return None


def after_marker(text: str, marker: str) -> str | None:
    """Return the text after the last marker; None if there is no marker.

    >>> after_marker("#### 41, no: #### 42 ", "####")
    '42'
    """
    _, found, rest = text.rpartition(marker)
    return rest.strip() if found else None


def last_tagged(text: str, tag: str) -> str | None:
    """Return the content of the last ``<tag>...</tag>``; None if there is none.

    >>> last_tagged("<answer>41</answer> no, <answer> 42 </answer>.", "answer")
    '42'
    """
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return text[start + len(tag) + 2 : end].strip() if start >= 0 else None


def in_think_format(text: str, opened: bool) -> bool:
    """Check that a text is ``<think>...</think> <answer>...</answer>``, each once, nothing else.

    Args:
        text: the completion.
        opened: the prompt already ends with ``<think>``, so the completion must not open it.
    """
    tags = re.findall(r"</?(?:think|answer)>", text)
    wanted = ["<think>", "</think>", "<answer>", "</answer>"][1 if opened else 0 :]
    stripped = text.strip()
    between = stripped.partition("</think>")[2].partition("<answer>")[0]
    starts = opened or stripped.startswith("<think>")
    return tags == wanted and starts and stripped.endswith("</answer>") and not between.strip()


def answer_of(reward: Reward, sample: Sample) -> str | None:
    """Return the answer that majority@k compares; None if the completion has none.

    The answer is the text on which the verdict is based (``TaskReward.answer``). If that method
    fails, a warning says so, and there is no answer. For a plain function, the answer is the whole
    text. Texts with reasoning are hardly ever equal, so majority@k is then close to pass@1.
    """
    extract = getattr(reward, "answer", None)
    if not callable(extract):
        return sample.text.strip()
    try:
        found = extract(own_copy(sample))
    except Exception as error:
        failed = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"the reward's `answer` failed, so the completion does not vote: {failed}.",
            stacklevel=2,
        )
        return None
    return None if found is None else str(found)
