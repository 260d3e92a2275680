"""Renders messages with chat templates that take contents as text, or only as lists of parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from kdrl_lightning.common.untyped import HFTokenizer, Tree

# `Any`: options of users' chat templates.

PART = re.compile(r"""['"]type['"]: ?['"]text['"]""")


def in_parts(turns: Sequence[Tree]) -> list[Tree]:
    """Return messages whose texts are lists of one part, the form that multimodal models use.

    >>> in_parts([{"role": "user", "content": "hi"}])
    [{'role': 'user', 'content': [{'type': 'text', 'text': 'hi'}]}]
    """
    return [
        {**turn, "content": [{"type": "text", "text": turn["content"]}]}
        if isinstance(turn.get("content"), str)
        else turn
        for turn in turns
    ]


def prints_parts(text: str) -> bool:
    """Return whether a template printed parts as Python or JSON, because it expects texts.

    >>> prints_parts("user: [{'type': 'text', 'text': 'hi'}]"), prints_parts("user: hi")
    (True, False)
    """
    return PART.search(text) is not None


def render(tokenizer: HFTokenizer, turns: Sequence[Tree], **options: Any) -> str:
    """Render messages with contents as text or, if the template refuses or loses some, as parts.

    If both forms lose some, return the first one that the template accepts.

    Args:
        tokenizer: the tokenizer with the chat template.
        turns: messages whose contents are texts without white space at the ends.
        **options: arguments of ``apply_chat_template``.

    Raises:
        Exception: the template refuses both forms; the error is that of the first.
    """
    found: list[str] = []
    errors: list[Exception] = []
    for form in (list(turns), in_parts(turns)):
        try:
            text = str(tokenizer.apply_chat_template(form, tokenize=False, **options))
        except Exception as error:  # templates raise errors of any type
            errors.append(error)
            continue
        found.append(text)
        if all(turn["content"] in text for turn in turns) and not prints_parts(text):
            return text
    if not found:
        raise errors[0]
    return found[0]
