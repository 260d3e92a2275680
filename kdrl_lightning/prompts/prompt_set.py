"""The prompts of a source, encoded when they are drawn, after a look at a sample of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kdrl_lightning.errors import BadRow, ConfigurationError, TrainingStopped
from kdrl_lightning.prompts.base import EncodedPrompt, Prompts, PromptSource
from kdrl_lightning.prompts.encoding import encode_prompt

# Rows that a run looks at before it starts, beside the first and the last: under a second.
CHECKED_ROWS = 1_000


@dataclass(frozen=True)
class PromptRules:
    """What a prompt must keep to.

    Attributes:
        limit: most tokens.
        why: what the limit follows from, for messages.
        refused: lengths below ``limit`` that cannot be either, with what they follow from.
        drop: leave longer prompts out, instead of stopping the run.
        vocabularies: rows of the embedding by the model's name: every id must be below.
        checks: each raises ``ConfigurationError`` for a row that it cannot take; see ``require``.
    """

    limit: float = float("inf")
    why: str = ""
    refused: Sequence[tuple[range, str]] = ()
    drop: bool = False
    vocabularies: Mapping[str, int] = field(default_factory=dict)
    checks: Sequence[Callable[[Mapping[str, Any]], Any]] = ()

    def broken_by(self, tokens: int) -> tuple[float, str] | None:
        """Return the limit that a prompt of this length exceeds, and its reason; None: it fits."""
        if tokens > self.limit:
            return self.limit, self.why
        found = ((lengths.start - 1, why) for lengths, why in self.refused if tokens in lengths)
        return next(found, None)


class PromptSet(Sequence[EncodedPrompt]):
    """A source's prompts with their token ids.

    A source of at most ``most`` rows is encoded at once, and kept. Of a larger one a seeded sample
    is checked, and rows are encoded when they are drawn: it needs no memory per row.

    Args:
        source: the rows.
        name: the setting that names it, for messages.
        tokenizer: the student's.
        rules: what every prompt must keep to.
        most: rows to check; see ``CHECKED_ROWS``.
        seed: of the sample.

    Attributes:
        sample: the usable prompts among those that were checked.
        checked: how many were.
        overlong: number and tokens of the prompts among them that are too long.
        whole: all rows were checked; those that are too long are no part of the set.

    Raises:
        ConfigurationError: no rows, or a checked row that cannot be used.
    """

    def __init__(
        self,
        source: Prompts,
        name: str,
        tokenizer: Any,
        rules: PromptRules,
        most: int = CHECKED_ROWS,
        seed: int = 0,
    ) -> None:
        self.source, self.name, self.tokenizer, self.rules = source, name, tokenizer, rules
        count = len(source)
        if not count:
            raise ConfigurationError(f"`{name}` must have at least one row: got none.")
        numbers = sample_rows(count, most, seed)
        self.checked, self.whole = len(numbers), len(numbers) == count
        self.sample: list[EncodedPrompt] = []
        self.overlong: list[tuple[int, int]] = []
        self._numbers: list[int] = []
        for number in numbers:
            prompt = self._encoded(number)
            if rules.broken_by(len(prompt[1])):
                self.overlong.append((number, len(prompt[1])))
            else:
                self.sample.append(prompt)
                self._numbers.append(number)
        if self.overlong and (not rules.drop or not self.sample):
            raise ConfigurationError(self._too_long())

    def __len__(self) -> int:
        return len(self.sample) if self.whole else len(self.source)

    def __getitem__(self, index: Any) -> Any:
        """Return one prompt.

        Raises:
            BadRow: the row cannot be used.
            TrainingStopped: it is too long, and such rows are to stop the run.
        """
        if self.whole:
            return self.sample[index]
        prompt, rules = self._encoded(index), self.rules
        broken = rules.broken_by(len(prompt[1]))
        if broken:
            limit, why = broken
            found = (
                f"row {index} of `{self.name}` has {len(prompt[1])} tokens, above {limit} ({why})"
            )
            if rules.drop:
                raise BadRow(f"{found}.", wished=True)
            raise TrainingStopped(f"{found}. Set `overlong_prompts: drop` to leave such rows out.")
        return prompt

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt that was checked."""
        return max(len(ids) for _, ids in self.sample)

    def limit(self, limit: int | None, why: str) -> None:
        """Take no longer prompts than this from now on; the checked ones must keep to it."""
        if limit is not None and limit < self.rules.limit:
            self.rules = replace(self.rules, limit=limit, why=why)

    def require(self, check: Callable[[Mapping[str, Any]], Any]) -> None:
        """Ask ``check`` for every row from now on, and at once for those that were checked."""
        for number, (row, _) in self.checked_rows():
            self._asked(check, row, number)
        self.rules = replace(self.rules, checks=(*self.rules.checks, check))

    def ask(
        self, check: Callable[[Mapping[str, Any]], Any], rows: Sequence[Mapping[str, Any]]
    ) -> None:
        """Ask ``check`` once, for those of ``rows`` that are rows of this set."""
        chosen = {id(row) for row in rows}
        for number, (row, _) in self.checked_rows():
            if id(row) in chosen:
                chosen.discard(id(row))  # a list may hold one row several times
                self._asked(check, row, number)

    def checked_rows(self) -> Iterator[tuple[int, EncodedPrompt]]:
        """Yield number and prompt of the usable rows among those that were checked."""
        return zip(self._numbers, self.sample, strict=True)

    def bad_row(self, number: int, reason: object) -> BadRow:
        """Return the error that names a row of the source."""
        where = self.source.where(number) if isinstance(self.source, PromptSource) else ""
        place = f" ({where})" if where else ""
        return BadRow(f"row {number} of `{self.name}`{place}: {reason}")

    def left_out(self) -> str:
        """Say in a line what is left out for its length; empty if nothing is."""
        if not self.overlong:
            return ""
        # Each has more tokens than its own limit, so more than the lowest of them.
        limits = [self.rules.broken_by(tokens) for _, tokens in self.overlong]
        count, limit = len(self.overlong), min(found[0] for found in limits if found)
        if self.whole:
            return (
                f"{self.name}: {count} of {self.checked} prompts left out, which have more than "
                f"{limit} tokens"
            )
        return (
            f"{self.name}: {count} of {self.checked} prompts checked, of {len(self.source)}, have "
            f"more than {limit} tokens; a run leaves such prompts out when it draws them"
        )

    def _too_long(self) -> str:
        number, tokens = self.overlong[0]
        limit, why = self.rules.broken_by(tokens) or (self.rules.limit, self.rules.why)
        seen = "" if self.whole else f" checked, of {len(self.source)}"
        return (
            f"`{self.name}` must have at most {limit} tokens a prompt ({why}): got {tokens} in row "
            f"{number}, and {len(self.overlong)} such rows of {self.checked}{seen}. Set "
            "`overlong_prompts: drop`, or lower `max_tokens`."
        )

    def _encoded(self, number: int) -> EncodedPrompt:
        try:
            row = self.source[number]
            if not isinstance(row, Mapping):
                raise ConfigurationError(f"a row must be a mapping of columns: got {row!r:.80}.")
            ids = encode_prompt(self.tokenizer, row)
            for model, rows in self.rules.vocabularies.items():
                check_ids(ids, rows, model, self.tokenizer)
        except ConfigurationError as error:
            raise self.bad_row(number, error) from error
        except Exception as error:  # whatever a source of the user's meets
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise self.bad_row(number, f"it must be readable: got {reason}.") from error
        for check in self.rules.checks:
            self._asked(check, row, number)
        return row, ids

    def _asked(
        self, check: Callable[[Mapping[str, Any]], Any], row: Mapping[str, Any], number: int
    ) -> None:
        try:
            check(row)
        except ConfigurationError as error:
            raise self.bad_row(number, error) from error


def sample_rows(count: int, most: int, seed: int) -> list[int]:
    """Return the first and the last of ``count`` rows and ``most`` others, in order.

    >>> sample_rows(4, 4, seed=0), len(sample_rows(10**9, 100, seed=0))
    ([0, 1, 2, 3], 102)
    """
    if count <= most + 2:
        return list(range(count))
    others = random.Random(seed).sample(range(1, count - 1), most)
    return [0, *sorted(others), count - 1]


def check_ids(ids: Sequence[int], rows: int, model: str, tokenizer: Any) -> None:
    """Check that a model has an embedding for every token.

    Raises:
        ConfigurationError: it has not; on a GPU this would be an assertion of the device.
    """
    highest = max(ids, default=-1)
    if highest >= rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise ConfigurationError(
            f"every token must have a row in the embedding of the {model}, {rows} rows: got the "
            f"token {token!r}, id {highest}. Take the tokenizer that the model was made with, or "
            "resize its embedding."
        )
