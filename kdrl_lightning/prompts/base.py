"""The prompt protocol, and how a row becomes token ids."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.prompts.messages import TEMPLATE_ARGS


class PromptSource(ABC):
    """A sized sequence of rows; where one is asked for, a list of dicts will do as well.

    A row has ``prompt``: a string, or a list of chat messages (``{"role": ..., "content": ...}``),
    which is rendered with the tokenizer's chat template and the row's ``template_args``, if it has
    any. Other columns reach the reward.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @abstractmethod
    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Return one row."""


Prompts: TypeAlias = PromptSource | Sequence[Mapping[str, Any]]
EncodedPrompt: TypeAlias = tuple[Mapping[str, Any], list[int]]


def encode_all(source: Prompts, name: str, tokenizer: Any) -> list[EncodedPrompt]:
    """Return every row with its token ids.

    Raises:
        ConfigurationError: the source is empty, or a row cannot be encoded.
    """
    rows = [source[i] for i in range(len(source))]
    if not rows:
        raise ConfigurationError(f"`{name}` must have at least one row: got none.")
    return [(row, encode_prompt(tokenizer, row)) for row in rows]


def within(
    prompts: Sequence[EncodedPrompt], limit: int
) -> tuple[list[EncodedPrompt], list[tuple[int, int]]]:
    """Part prompts by length.

    Returns:
        Those of at most ``limit`` tokens, and of the others row and number of tokens.

    >>> within([({}, [1, 2]), ({}, [1, 2, 3])], 2)
    ([({}, [1, 2])], [(1, 3)])
    """
    kept = [prompt for prompt in prompts if len(prompt[1]) <= limit]
    return kept, [(i, len(ids)) for i, (_, ids) in enumerate(prompts) if len(ids) > limit]


def first_of_each_kind(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the first row of each set of columns and ``source``: one per part of a mixture.

    >>> first_of_each_kind([{"a": 1}, {"a": 2}, {"b": 1}, {"a": 1, "source": "x"}])
    [{'a': 1}, {'b': 1}, {'a': 1, 'source': 'x'}]
    """
    kinds: dict[Any, Mapping[str, Any]] = {}
    for row in rows:
        kinds.setdefault((frozenset(row), str(row.get("source"))), row)
    return list(kinds.values())


def encode_prompt(tokenizer: Any, row: Mapping[str, Any]) -> list[int]:
    """Turn a row's prompt into token ids.

    Raises:
        ConfigurationError: no ``prompt`` column, an empty prompt, or messages without a template.
    """
    if "prompt" not in row:
        raise ConfigurationError(
            f"a prompt row must have the column `prompt`: got {sorted(row)}. Rename the column."
        )
    prompt = row["prompt"]
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif not isinstance(prompt, list | tuple):
        raise ConfigurationError(
            f"a prompt must be a string or a list of chat messages: got {prompt!r}."
        )
    elif getattr(tokenizer, "chat_template", None):
        ids = _render(tokenizer, prompt, row.get(TEMPLATE_ARGS, {}))
    else:
        raise ConfigurationError(
            "a prompt of messages needs a tokenizer with a chat template: got none. "
            "Give plain text, or a model with a template."
        )
    if not ids:
        raise ConfigurationError(f"a prompt must have at least one token: got {prompt!r}.")
    return list(ids)


def _render(tokenizer: Any, messages: Sequence[Any], arguments: Mapping[str, Any]) -> list[int]:
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    try:
        ids: list[int] = tokenizer.apply_chat_template(messages, **options, **arguments)[
            "input_ids"
        ]
    except Exception as error:  # whatever the template meets in the messages, or refuses by itself
        raise ConfigurationError(
            f"a prompt must be messages that the chat template takes: got {messages!r:.200} "
            f"({type(error).__name__}: {error})."
        ) from error
    return ids
