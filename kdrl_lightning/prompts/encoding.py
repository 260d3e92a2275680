"""Encodes a row's prompt as token ids."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from kdrl_lightning.common.chat_templates import in_parts, prints_parts
from kdrl_lightning.common.untyped import HFTokenizer, Row, Tree
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.prompts.messages import CONTINUE, OURS, TEMPLATE_ARGS, check_template_args
from kdrl_lightning.prompts.turns import (
    ROLES,
    check_characters,
    check_rendered,
    check_unicode,
    clean_messages,
    is_json_of_messages,
    plain,
    tools_of,
    without_none,
)

# `Any`: the content of users' messages.

# Characters that rarely merge with the text after them into one token.
FRONTS = ("\n", "=", "x")


def encode_prompt(tokenizer: HFTokenizer, row: Row, ends: Collection[int] = ()) -> list[int]:
    """Return the token ids of a row's prompt, with at most one BOS and without a final end token.

    Args:
        tokenizer: the student's tokenizer.
        row: the prompt's row; ``template_args`` and ``tools`` reach the chat template.
        ends: end tokens besides the tokenizer's ``eos_token``.

    Raises:
        ConfigurationError: the row has no ``prompt``, the prompt is empty or ends with an end
            token, or the chat template cannot render the messages or leaves text out.
    """
    if "prompt" not in row:
        raise ConfigurationError(
            f"a prompt row must have the column `prompt`: got {sorted(row)}. Rename the column."
        )
    prompt = row["prompt"]
    if hasattr(prompt, "tolist"):
        prompt = plain(prompt)
    if isinstance(prompt, str):
        ids = _encode_text(tokenizer, prompt)
    elif not isinstance(prompt, list | tuple):
        raise ConfigurationError(
            f"a prompt must be a string or a list of chat messages: got {prompt!r}. Convert it, or "
            "remove the row."
        )
    elif getattr(tokenizer, "chat_template", None):
        ids = _encode_messages(tokenizer, plain(prompt), row)
    else:
        raise ConfigurationError(
            "a prompt of messages must have a tokenizer with a chat template: got none. Use "
            "plain-text prompts, or a model with a chat template."
        )
    if not ids:
        raise ConfigurationError(
            f"a prompt must have at least one token: got {prompt!r}. Remove the row."
        )
    _refuse_an_end(tokenizer, ids, prompt, ends)
    return ids


def _encode_text(tokenizer: HFTokenizer, text: str) -> list[int]:
    """Encode a text; one that was already rendered with a chat template may begin with BOS."""
    if is_json_of_messages(text):
        raise ConfigurationError(
            "a prompt must be a string or a list of chat messages: got messages as a string, "
            f"{text[:40]!r}. Store the column as lists, e.g. in JSON Lines."
        )
    check_unicode(text)
    text_ids = _bare_ids(tokenizer, text)
    if not text_ids:
        return []
    if not text.strip():
        raise ConfigurationError(
            f"a prompt must be more than white space: got {text!r}. Remove the row."
        )
    check_characters(tokenizer, text)
    ids = [*_added_in_front(list(tokenizer(text)["input_ids"]), text_ids), *text_ids]
    return _trimmed(tokenizer, ids, lambda: text)


def encode_inside(tokenizer: HFTokenizer, text: str) -> list[int]:
    """Return the token ids of a text that continues another one.

    Some tokenizers (Llama 2, Mistral, Phi-3) put a space before everything that they encode, which
    would be wrong in the middle of a text. So we encode the text after a character and drop that.

    Args:
        tokenizer: the tokenizer.
        text: the continuation, exactly as it is in the whole text.
    """
    one, alone = (_bare_ids(tokenizer, part) for part in ("1", text))
    if " " in str(tokenizer.decode([*one, *one])):
        for front in FRONTS:
            before, whole = (_bare_ids(tokenizer, part) for part in (front, front + text))
            if before and whole[: len(before)] == before:
                return whole[len(before) :]
    return alone


def _bare_ids(tokenizer: HFTokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _added_in_front(with_added: list[int], text_ids: list[int]) -> list[int]:
    """Return the tokens that the tokenizer adds before a text, unless the text begins with them.

    Tokens that it adds after the text, such as an end token or a separator, are dropped.

    >>> _added_in_front([1, 7, 8, 2], [7, 8]), _added_in_front([1, 1, 7, 8, 2], [1, 7, 8])
    ([1], [])
    """
    for start in range(len(with_added) - len(text_ids) + 1):
        if with_added[start : start + len(text_ids)] == text_ids:
            front = with_added[:start]
            return [] if text_ids[0] in front else front
    return []


def _trimmed(tokenizer: HFTokenizer, ids: list[int], text: Callable[[], str]) -> list[int]:
    """Remove a second BOS, and a final end token that is not part of the text.

    Some tokenizers add them even with ``add_special_tokens=False``.
    """
    bos, end = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos"))
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    if len(ids) > 1 and ids[-1] == end and not text().rstrip().endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]
    return ids


def _encode_messages(tokenizer: HFTokenizer, messages: Sequence[Any], row: Row) -> list[int]:
    """Render a conversation and encode it."""
    template = str(tokenizer.chat_template)
    arguments = without_none(plain(row.get(TEMPLATE_ARGS) or {}))
    if arguments != arguments:  # pandas marks a missing value with NaN
        arguments = {}
    check_template_args(arguments, "the column ")
    continued = _is_true(arguments.pop(CONTINUE, False)) or _is_true(row.get(CONTINUE))
    options: Tree = {"add_generation_prompt": not continued, "tokenize": True, "return_dict": True}
    if continued:
        options[CONTINUE] = True
    tools = tools_of(row, template)
    if tools:
        arguments.setdefault("tools", tools)
    try:
        turns = clean_messages(messages, template)
        ids, text = _rendered(tokenizer, turns, {**options, **arguments})
    except ConfigurationError:
        raise
    except Exception as error:  # a template may fail on its input, or raise on purpose
        raise ConfigurationError(
            f"a prompt must be messages that the chat template accepts: got {messages!r:.200} "
            f"({type(error).__name__}: {' '.join(str(error).split())}). Fix or remove the row."
        ) from error
    for turn in turns:
        check_characters(tokenizer, str(turn.get("content") or ""))
    return _trimmed(tokenizer, ids, lambda: text)


def _rendered(
    tokenizer: HFTokenizer, turns: Sequence[Tree], options: Mapping[str, Any]
) -> tuple[list[int], str]:
    """Return a conversation's ids and text; contents become parts if strings are not rendered."""
    arguments = {name: one for name, one in options.items() if name not in OURS | {CONTINUE}}
    continued = bool(options.get(CONTINUE))
    errors: list[Exception] = []
    for form in (turns, in_parts(turns)):
        try:
            answering = _answering(tokenizer, form, arguments)
            _check_the_last([turn["role"] for turn in turns], answering, continued)
            ids = list(tokenizer.apply_chat_template(form, **options)["input_ids"])
            unencoded = {**options, "tokenize": False, "return_dict": False}
            text = str(tokenizer.apply_chat_template(form, **unencoded))
            check_rendered(turns, text)
        except Exception as error:
            errors.append(error)
        else:
            if not errors or not prints_parts(text):
                return ids, text
    raise errors[0]


def warn_of_ignored(rows: Iterable[Row], tokenizer: HFTokenizer) -> None:
    """Warn about `template_args` that the chat template does not read."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    given = [plain(row.get(TEMPLATE_ARGS)) for row in rows]
    names = {str(name) for one in given if isinstance(one, dict) for name in without_none(one)}
    ignored = sorted(name for name in names - {CONTINUE} if name not in template)
    if ignored:
        warnings.warn(
            f"`{TEMPLATE_ARGS}` have no effect: the chat template does not read "
            f"{', '.join(ignored)}. Correct the name, or remove it.",
            stacklevel=2,
        )


def _is_true(value: object) -> bool:
    if isinstance(value, str):
        raise ConfigurationError(
            f"the column `{CONTINUE}` must be true or false: got the text {value!r:.20}. Convert "
            "it."
        )
    return value is not None and value == value and bool(value)  # NaN is an empty cell


def _answering(
    tokenizer: HFTokenizer, turns: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
) -> set[str]:
    """Return the names of the role in which the model answers, such as Gemma's `model`."""
    last = turns[-1]["role"]
    if last in ROLES:
        return {"assistant"}
    closed, opened = (
        str(tokenizer.apply_chat_template(turns, tokenize=False, **arguments, **options))
        for options in ({}, {"add_generation_prompt": True})
    )
    return {"assistant", last} if last in opened.removeprefix(closed) else {"assistant"}


def _check_the_last(roles: Sequence[str], answering: set[str], continued: bool) -> None:
    """Refuse a conversation that already ends with the answer, unless the model continues it."""
    if continued and roles[-1] not in answering:
        raise ConfigurationError(
            f"a prompt with `{CONTINUE}` must end with an assistant message: got {roles[-1]}. Add "
            f"the beginning of the answer, or remove `{CONTINUE}`."
        )
    before = roles[:-1] if continued else roles
    if before and before[-1] in answering:
        raise ConfigurationError(
            "a prompt must not end with an assistant message, which would show the model its "
            f"answer: got one in message {len(before) - 1}. Remove it, or let the model continue "
            f"it: set the column `{CONTINUE}`, or `template_args: {{{CONTINUE}: true}}`."
        )


def _refuse_an_end(
    tokenizer: HFTokenizer, ids: Sequence[int], prompt: object, ends: Collection[int]
) -> None:
    """Refuse a prompt that ends with an end token, apart from white space after it."""
    known = {getattr(tokenizer, "eos_token_id", None), *ends}
    tail = list(ids[-3:])
    last = next((i for i in range(len(tail) - 1, -1, -1) if tail[i] in known), None)
    if last is None or len(ids) == 1:  # BOS alone may be the same token
        return
    after = tail[last + 1 :]
    if after and tokenizer.decode(after).strip():
        return
    cure = "Remove the token."
    if not isinstance(prompt, str):
        cure = "Use a chat template that opens the assistant's turn (`add_generation_prompt`)."
    raise ConfigurationError(
        f"a prompt must not end with the end token {tokenizer.convert_ids_to_tokens(tail[last])}: "
        f"got {prompt!r:.100}. {cure}"
    )
