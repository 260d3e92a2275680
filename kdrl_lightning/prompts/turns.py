"""Converts messages and tools from data sets into the form that a chat template accepts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kdrl_lightning.common.untyped import HFTokenizer, Row, Tree, Value
from kdrl_lightning.errors import ConfigurationError

# `Any`: the content of users' messages and tools.

# Roles that chat templates know; a role that the template itself names is accepted, too.
ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython"}

# Replaces a message that was found; no valid text contains it.
GAP = "\ud800"

# A character for private use, which no vocabulary has.
NO_CHARACTER = "\U000f0000"

# Words that switch a model's thinking, and that its template removes (SmolLM3).
SWITCH = re.compile(r"/(?:no_?think|think|system_override)\b")


def plain(value: Value) -> Value:
    """Convert numpy's arrays and scalars, which Parquet readers return, to plain Python values.

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


def without_none(value: Value) -> Value:
    """Remove keys whose value is None, at any depth.

    Parquet stores the same keys for all messages of a file and fills missing ones with None, but
    templates test whether a message has ``tool_calls``.

    >>> without_none([{"role": "user", "content": "hi", "tool_calls": None}])
    [{'role': 'user', 'content': 'hi'}]
    """
    if isinstance(value, Mapping):
        return {key: without_none(one) for key, one in value.items() if one is not None}
    if isinstance(value, list | tuple):
        return [without_none(one) for one in value]
    return value


def is_json_of_messages(text: str) -> bool:
    """Check whether a text is one or several messages, written as JSON or with ``repr``.

    >>> is_json_of_messages('[{"role": "user", "content": "hi"}]'), is_json_of_messages("[1, 2]")
    (True, False)
    """
    start = "".join(text[:64].split()).replace("'", '"')
    start = start.removeprefix('{"messages":').removeprefix('{"prompt":')
    return start.startswith(('[{"role":', '[{"content":', '{"role":"'))


def clean_messages(messages: Sequence[Any], template: str) -> list[Tree]:
    """Return a conversation's messages as new dicts, with known roles, text content and no None.

    Args:
        messages: the messages of one conversation; they are not changed.
        template: the chat template, which may know further roles.

    Raises:
        ValueError: an entry is not a message.
        ConfigurationError: there is no message, or one has an unknown role or content that is not
            valid text.
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
        check_unicode(str(turn.get("content") or ""))
        turns.append(turn)
    if not turns:
        raise ConfigurationError("a prompt must have at least one message: got []. Remove the row.")
    asked = [turn["content"] for turn in turns if turn["role"] == "user"]
    if asked and not asked[-1].strip():
        raise ConfigurationError(
            f"the last user message must have text: got {asked[-1]!r}. Remove the row."
        )
    return turns


def _joined(parts: Sequence[Any], number: int) -> str:
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind != "text" or not isinstance(text, str):
            what = kind if kind != "text" else f"text without a text, {part!r:.40},"
            raise ConfigurationError(
                f"a message must contain only text: got a part of type {what} in message {number}. "
                "Images, audio and video are not supported: remove such rows."
            )
        texts.append(str(text))
    return "".join(texts)


def _check_content(turn: Mapping[str, Any], number: int) -> None:
    role, content = turn["role"], turn.get("content")
    if role in ("tool", "function", "ipython") or (content is None and turn.get("tool_calls")):
        return  # a tool may return any value; a message with a tool call needs no text
    if not isinstance(content, str):
        found = "none" if content is None else f"{type(content).__name__} {content!r:.40}"
        raise ConfigurationError(
            f"the content of a message must be text: got {found} in message {number} ({role}). "
            "Add the text, or remove the row."
        )


def check_unicode(text: str) -> None:
    """Check that a text can be encoded; JSON can contain half of a surrogate pair.

    Raises:
        ConfigurationError: it cannot be encoded.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start : error.end]
        raise ConfigurationError(
            f"a prompt must be valid Unicode: got {found!r} in character {error.start}. Fix or "
            "remove the row."
        ) from None


def check_characters(tokenizer: HFTokenizer, text: str, what: str = "prompt") -> None:
    """Check that a tokenizer drops no character of a text.

    Most tokenizers encode unknown characters as bytes or as an unknown token.

    Raises:
        ConfigurationError: the tokenizer drops a character.
    """
    if tokenizer(NO_CHARACTER, add_special_tokens=False)["input_ids"]:
        return
    plain_text = text
    for token in tokenizer.get_added_vocab():
        plain_text = plain_text.replace(token, "")
    letters = sorted({c for c in plain_text if c.isprintable() and c != " "})
    coded = tokenizer(letters, add_special_tokens=False)["input_ids"] if letters else []
    dropped = [c for c, ids in zip(letters, coded, strict=True) if not ids]
    if dropped:
        raise ConfigurationError(
            f"the tokenizer must know every character of a {what}: got "
            f"{', '.join(map(repr, dropped[:5]))}, which it would leave out of {text!r:.100}. Use "
            f"a model with another tokenizer, or change the {what}."
        )


def check_rendered(turns: Sequence[Mapping[str, Any]], text: str) -> None:
    """Check that a chat template has kept what the system and the user say, up to white space.

    Templates change assistants' messages (they drop old reasoning) and tools' results.

    Args:
        turns: the messages.
        text: the rendered conversation.

    Raises:
        ConfigurationError: the content of a message does not occur in the text.
    """
    words = " ".join(text.split())
    asked = [
        (number, turn["role"], turn["content"])
        for number, turn in enumerate(turns)
        if turn["role"] in ("system", "developer", "user") and isinstance(turn.get("content"), str)
    ]
    lost = []
    # The longest first, each in a separate place: "1" must not be found inside "1 + 1".
    for number, role, content in sorted(asked, key=lambda one: -len(one[2])):
        # Some templates write JSON.
        forms = [SWITCH.split(content), [json.dumps(content, ensure_ascii=False)[1:-1]]]
        forms = [[" ".join(part.split()) for part in parts] for parts in forms]
        found = next((parts for parts in forms if all(part in words for part in parts)), None)
        if found is None:
            lost.append((number, role, content))
        for part in filter(None, found or ()):
            words = words.replace(part, GAP, 1)
    if lost:
        number, role, content = min(lost)
        raise ConfigurationError(
            f"the chat template must render every message as it is: got {text!r:.80} without "
            f"message {number} ({role}), {content!r:.60}. Fix the template, or remove the message."
        )


def tools_of(row: Row, template: str) -> list[Value]:
    """Return the tools that a row offers to the model; a text is parsed as JSON.

    Raises:
        ConfigurationError: the tools are not a list, or the template would not show them.
    """
    tools = plain(row.get("tools"))
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ConfigurationError(
                f"the column `tools` must be a list, or a list in JSON: got {tools[:40]!r} "
                f"({error}). Fix the column."
            ) from error
    if not tools or tools != tools:  # pandas marks a missing value with NaN
        return []
    if not isinstance(tools, list):
        raise ConfigurationError(
            f"the column `tools` must be a list, or a list in JSON: got {tools!r:.40}. Fix the "
            "column."
        )
    if "tools" not in template:
        raise ConfigurationError(
            "the chat template must accept `tools` if a row has this column: got a template that "
            "ignores them. Rename the column if the model must not see it."
        )
    return [without_none(tool) for tool in tools]
