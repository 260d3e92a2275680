"""How the prompt of a row becomes token ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.prompts.messages import CONTINUE, TEMPLATE_ARGS
from kdrl_lightning.prompts.turns import (
    clean_messages,
    is_json_of_messages,
    plain,
    tools_of,
    without_none,
)

# Arguments that are no matter of the template.
OURS = {"add_generation_prompt", "tokenize", "return_dict", "return_tensors", "padding"}


def encode_prompt(tokenizer: Any, row: Mapping[str, Any]) -> list[int]:
    """Turn a row's prompt into token ids: one BOS at most, and no end token after it.

    Raises:
        ConfigurationError: no ``prompt`` column, an empty prompt, or messages that cannot be
            rendered.
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
            f"a prompt must be a string or a list of chat messages: got {prompt!r}."
        )
    elif getattr(tokenizer, "chat_template", None):
        ids = _encode_messages(tokenizer, plain(prompt), row)
    else:
        raise ConfigurationError(
            "a prompt of messages needs a tokenizer with a chat template: got none. "
            "Give plain text, or a model with a template."
        )
    if not ids:
        raise ConfigurationError(f"a prompt must have at least one token: got {prompt!r}.")
    _refuse_an_end(tokenizer, ids, prompt)
    return ids


def _encode_text(tokenizer: Any, text: str) -> list[int]:
    """Encode a text, which may begin with BOS if somebody has rendered it already."""
    if is_json_of_messages(text):
        raise ConfigurationError(
            "a prompt must be a string or a list of chat messages: got messages as a string, "
            f"{text[:40]!r}. Store the column as lists, e.g. in JSON Lines."
        )
    plain_ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not plain_ids:
        return []
    if not text.strip():
        raise ConfigurationError(f"a prompt must be more than white space: got {text!r}.")
    ids = [*_added_in_front(list(tokenizer(text)["input_ids"]), plain_ids), *plain_ids]
    return _trimmed(tokenizer, ids, lambda: text)


def _added_in_front(with_added: list[int], text: list[int]) -> list[int]:
    """Return what the tokenizer puts before a text, unless the text brings it.

    What it puts after a text, an end token or a separator, is no part of a prompt.

    >>> _added_in_front([1, 7, 8, 2], [7, 8]), _added_in_front([1, 1, 7, 8, 2], [1, 7, 8])
    ([1], [])
    """
    for start in range(len(with_added) - len(text) + 1):
        if with_added[start : start + len(text)] == text:
            front = with_added[:start]
            return [] if text[0] in front else front
    return []


def _trimmed(tokenizer: Any, ids: list[int], text: Callable[[], str]) -> list[int]:
    """Leave out a second BOS, and an end token that is not in the text itself.

    Some tokenizers add them even if they are asked for a text without special tokens.
    """
    bos, end = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos"))
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    if len(ids) > 1 and ids[-1] == end and not text().rstrip().endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]
    return ids


def _encode_messages(tokenizer: Any, messages: Sequence[Any], row: Mapping[str, Any]) -> list[int]:
    """Render a conversation and encode it."""
    template = str(tokenizer.chat_template)
    arguments = without_none(plain(row.get(TEMPLATE_ARGS) or {}))
    if arguments != arguments:  # NaN is how pandas says that there are none
        arguments = {}
    if not isinstance(arguments, dict) or set(arguments) & OURS:
        raise ConfigurationError(
            f"the column `{TEMPLATE_ARGS}` must hold arguments of the chat template by name, other "
            f"than {', '.join(sorted(OURS))}: got {arguments!r:.80}."
        )
    goes_on = bool(arguments.pop(CONTINUE, False) or _is_true(row.get(CONTINUE)))
    options = {"add_generation_prompt": not goes_on, "tokenize": True, "return_dict": True}
    if goes_on:
        options[CONTINUE] = True
    tools = tools_of(row, template)
    if tools:
        arguments.setdefault("tools", tools)
    try:
        turns = clean_messages(messages, template)
        _check_the_last([turn["role"] for turn in turns], goes_on)
        ids = list(tokenizer.apply_chat_template(turns, **options, **arguments)["input_ids"])
    except ConfigurationError:
        raise
    except Exception as error:  # whatever the template meets in the messages, or refuses by itself
        raise ConfigurationError(
            f"a prompt must be messages that the chat template takes: got {messages!r:.200} "
            f"({type(error).__name__}: {' '.join(str(error).split())})."
        ) from error
    unencoded = {**options, **arguments, "tokenize": False, "return_dict": False}
    return _trimmed(tokenizer, ids, lambda: str(tokenizer.apply_chat_template(turns, **unencoded)))


def _is_true(value: Any) -> bool:
    return value is not None and value == value and bool(value)  # NaN is an empty cell


def _check_the_last(roles: Sequence[str], goes_on: bool) -> None:
    """Refuse a conversation that shows the model its answer, unless it is to be continued."""
    if goes_on and roles[-1] != "assistant":
        raise ConfigurationError(
            f"a prompt with `{CONTINUE}` must end with a message of the assistant: got "
            f"{roles[-1]}. Add the beginning of the answer, or leave `{CONTINUE}` out."
        )
    before = roles[:-1] if goes_on else roles
    if before[-1:] == ["assistant"]:
        raise ConfigurationError(
            "a prompt must not end with a message of the assistant, which would show the model its "
            f"answer: got one in message {len(before) - 1}. Take it out; to let the model continue "
            f"it, set the column `{CONTINUE}`, or `template_args: {{{CONTINUE}: true}}`."
        )


def _refuse_an_end(tokenizer: Any, ids: Sequence[int], prompt: Any) -> None:
    """Refuse a prompt whose last token, white space aside, is the end token."""
    end = getattr(tokenizer, "eos_token_id", None)
    tail = list(ids[-3:])
    if end is None or end not in tail or len(ids) == 1:  # BOS alone may be the same token
        return
    after = tail[len(tail) - tail[::-1].index(end) :]
    if after and tokenizer.decode(after).strip():
        return
    cure = "Take it off."
    if not isinstance(prompt, str):
        cure = "Let the chat template open the assistant's turn (`add_generation_prompt`)."
    raise ConfigurationError(
        f"a prompt must not end with the end token {tokenizer.eos_token}: got "
        f"{prompt!r:.100}. {cure}"
    )
