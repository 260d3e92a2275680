"""Messages as data sets bring them, made into what a chat template takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kdrl_lightning.errors import ConfigurationError

# What chat templates know; a template that names another role itself takes that one, too.
ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython"}


def plain(value: Any) -> Any:
    """Return numpy's arrays and scalars, which Parquet readers give, as Python's own values.

    >>> import numpy as np
    >>> plain(np.array([{"role": "user", "content": np.str_("1+1=")}]))
    [{'role': 'user', 'content': '1+1='}]
    """
    if isinstance(value, str):
        return str(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value


def without_none(value: Any) -> Any:
    """Leave out keys whose value is None, at any depth.

    Parquet has one set of keys for all messages of a file and fills the others with None, and a
    template asks whether ``tool_calls`` is there.

    >>> without_none([{"role": "user", "content": "hi", "tool_calls": None}])
    [{'role': 'user', 'content': 'hi'}]
    """
    if isinstance(value, Mapping):
        return {key: without_none(one) for key, one in value.items() if one is not None}
    if isinstance(value, list | tuple):
        return [without_none(one) for one in value]
    return value


def is_json_of_messages(text: str) -> bool:
    """Say whether a text is a list of messages that somebody wrote as JSON or by ``repr``.

    >>> is_json_of_messages('[{"role": "user", "content": "hi"}]'), is_json_of_messages("[1, 2]")
    (True, False)
    """
    start = "".join(text[:64].split()).replace("'", '"')
    return start.startswith(('[{"role":', '[{"content":'))


def clean_messages(messages: Sequence[Any], template: str) -> list[dict[str, Any]]:
    """Return messages with a known role and text content, as new dicts without None.

    Args:
        messages: of one conversation; left as they are.
        template: the chat template, which may know further roles.

    Raises:
        ValueError: something is no message.
        ConfigurationError: a message that no template of text would render right.
    """
    turns = []
    for number, turn in enumerate(messages):
        if not isinstance(turn, Mapping):
            raise ValueError(f"message {number} has no role")
        turn = without_none(turn)
        role = turn.get("role")
        if not isinstance(role, str):
            raise ValueError(f"message {number} has no role")
        if role not in ROLES and role not in template:
            raise ConfigurationError(
                f"the role of a message must be one of {', '.join(sorted(ROLES))}, or one that the "
                f"chat template names: got {role} in message {number}. Rename it."
            )
        if isinstance(turn.get("content"), list):
            turn["content"] = _joined(turn["content"], number)
        _check_content(turn, number)
        turns.append(turn)
    if not turns:
        raise ConfigurationError(
            "a prompt must have at least one message: got []. Leave the row out."
        )
    asked = [turn["content"] for turn in turns if turn["role"] == "user"]
    if asked and not asked[-1].strip():
        raise ConfigurationError(
            f"the last message of the user must have text: got {asked[-1]!r}. Leave the row out."
        )
    return turns


def _joined(parts: Sequence[Any], number: int) -> str:
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text" or not isinstance(text, str):
            raise ConfigurationError(
                f"a message must be text alone: got a part of type {kind} in message {number}. "
                "Images, audio and video are not supported: leave such rows out."
            )
        texts.append(text)
    return "".join(texts)


def _check_content(turn: Mapping[str, Any], number: int) -> None:
    role, content = turn["role"], turn.get("content")
    if role in ("tool", "function", "ipython") or (content is None and turn.get("tool_calls")):
        return  # a tool may return any value, and a call needs no words
    if not isinstance(content, str):
        found = "none" if content is None else f"{type(content).__name__} {content!r:.40}"
        raise ConfigurationError(
            f"the content of a message must be text: got {found} in message {number} ({role})."
        )


def tools_of(row: Mapping[str, Any], template: str) -> list[Any]:
    """Return the tools that a row offers to the model; a text is read as JSON.

    Raises:
        ConfigurationError: they are no list, or the template would not show them.
    """
    tools = plain(row.get("tools"))
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ConfigurationError(
                f"the column `tools` must be a list, or a list in JSON: got {tools[:40]!r} "
                f"({error})."
            ) from error
    if not tools or tools != tools:  # NaN is how pandas says that there are none
        return []
    if not isinstance(tools, list):
        raise ConfigurationError(
            f"the column `tools` must be a list, or a list in JSON: got {tools!r:.40}."
        )
    if "tools" not in template:
        raise ConfigurationError(
            "the chat template must take `tools` if a row has this column: got a template without "
            "them. Rename the column if the model is not meant to see it."
        )
    return [without_none(tool) for tool in tools]
