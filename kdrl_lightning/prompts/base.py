"""The prompt protocol, and the encoding of all rows of a source."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from kdrl_lightning.common.untyped import HFTokenizer, Row
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.prompts.encoding import encode_prompt as encode_prompt


class PromptSource(ABC):
    """A sized sequence of rows; a list of dicts works wherever a source is expected.

    Each row has a ``prompt``: a string, or a list of chat messages (``{"role": ..., "content":
    ...}``), which is rendered with the tokenizer's chat template and the row's ``template_args``
    (if there are any). The reward gets all other columns.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @abstractmethod
    def __getitem__(self, index: int) -> Row:
        """Return one row."""

    def where(self, index: int) -> str:
        """Describe where a row comes from, for error messages; empty if its number is enough."""
        return ""


# Before a run, we try the reward on one row each of at most this many kinds.
MOST_KINDS = 50

Prompts: TypeAlias = PromptSource | Sequence[Row]
EncodedPrompt: TypeAlias = tuple[Row, list[int]]


def encode_all(source: Prompts, name: str, tokenizer: HFTokenizer) -> list[EncodedPrompt]:
    """Return every row of a source with its token ids.

    Args:
        source: the rows.
        name: the setting that names the source, for error messages.
        tokenizer: the student's tokenizer.

    Raises:
        ConfigurationError: the source is empty, or a row cannot be encoded.
    """
    prompts = []
    for i in range(len(source)):
        row = source[i]
        try:
            prompts.append((row, encode_prompt(tokenizer, row)))
        except ConfigurationError as error:
            raise ConfigurationError(f"row {i} of `{name}`: {error}") from error
    if not prompts:
        raise ConfigurationError(f"`{name}` must have at least one row: got none. Add rows.")
    return prompts


def first_of_each_kind(rows: Iterable[Row], most: int = MOST_KINDS) -> list[Row]:
    """Return one row of each kind, i.e. of each combination of column names and ``source``.

    If there are more than ``most`` kinds (e.g. because every row has another ``source``), the
    result is a sample of ``most`` of them, the same for every call.

    >>> first_of_each_kind([{"a": 1}, {"a": 2}, {"b": 1}, {"a": 1, "source": "x"}])
    [{'a': 1}, {'b': 1}, {'a': 1, 'source': 'x'}]
    >>> len(first_of_each_kind(({"source": i} for i in range(20_000)), most=5))
    5
    """
    kinds: dict[object, Row] = {}
    for row in rows:
        kinds.setdefault((frozenset(row), str(row.get("source"))), row)
    found = list(kinds.values())
    if len(found) <= most:
        return found
    return [found[i] for i in sorted(random.Random(0).sample(range(len(found)), most))]
