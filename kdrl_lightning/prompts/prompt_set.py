"""A source's prompts: a sample is checked before the run, the rest when they are drawn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kdrl_lightning.common.untyped import HFTokenizer, Row
from kdrl_lightning.errors import BadRow, ConfigurationError, TrainingStopped
from kdrl_lightning.prompts.base import EncodedPrompt, Prompts, PromptSource
from kdrl_lightning.prompts.encoding import encode_prompt

# `Any`: a sequence's index is a number or a slice.

# Rows checked before a run, besides the first and the last; this takes under a second.
CHECKED_ROWS = 1_000


@dataclass(frozen=True)
class PromptRules:
    """The rules that every prompt must satisfy.

    Attributes:
        limit: maximum number of tokens.
        why: reason for the limit, for error messages.
        refused: ranges of lengths below ``limit`` that are not allowed either, with their reasons.
        drop: leave out prompts that are too long, instead of stopping the run.
        vocabularies: number of rows of each model's embedding, by the model's name.
        ends: end tokens with which no prompt may end, besides the tokenizer's ``eos_token``.
        checks: functions that raise ``ConfigurationError`` for a row that cannot be used; see
            ``require``.
    """

    limit: float = float("inf")
    why: str = ""
    refused: Sequence[tuple[range, str]] = ()
    drop: bool = False
    vocabularies: Mapping[str, int] = field(default_factory=dict)
    checks: Sequence[Callable[[Row], object]] = ()
    ends: Sequence[int] = ()

    def broken_by(self, tokens: int) -> tuple[float, str] | None:
        """Return the limit that a length exceeds, and its reason; None if the length is allowed.

        Args:
            tokens: number of the prompt's tokens.
        """
        if tokens > self.limit:
            return self.limit, self.why
        found = ((lengths.start - 1, why) for lengths, why in self.refused if tokens in lengths)
        return next(found, None)


class PromptSet(Sequence[EncodedPrompt]):
    """A source's prompts with their token ids.

    A source of at most ``most`` rows is encoded at once and kept. Of a larger source, a seeded
    sample is checked, and each row is encoded when it is drawn, so that rows need no memory.

    Args:
        source: the rows.
        name: the setting that names the source, for error messages.
        tokenizer: the student's tokenizer.
        rules: the rules that every prompt must satisfy.
        most: number of rows to check; see ``CHECKED_ROWS``.
        seed: seed of the sample.

    Attributes:
        sample: the usable prompts among the checked rows.
        checked: number of checked rows.
        overlong: (row number, tokens) of the checked prompts that are too long.
        whole: all rows were checked; the set then leaves out those that are too long.

    Raises:
        ConfigurationError: the source has no rows, or a checked row cannot be used.
    """

    def __init__(
        self,
        source: Prompts,
        name: str,
        tokenizer: HFTokenizer,
        rules: PromptRules,
        most: int = CHECKED_ROWS,
        seed: int = 0,
    ) -> None:
        self.source, self.name, self.tokenizer, self.rules = source, name, tokenizer, rules
        count = len(source)
        if not count:
            raise ConfigurationError(f"`{name}` must have at least one row: got none. Add rows.")
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
        """Return one prompt with its token ids.

        Raises:
            BadRow: the row cannot be used.
            TrainingStopped: the prompt is too long, and the rules do not say to drop it.
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
        """Number of tokens of the longest checked prompt."""
        return max(len(ids) for _, ids in self.sample)

    @property
    def bound(self) -> int:
        """Most tokens that a prompt may have, including those that are not checked yet."""
        return self.longest if self.whole else int(min(self.rules.limit, 1 << 30))

    def limit(self, limit: int | None, why: str) -> None:
        """Lower the maximum length from now on; the caller ensures that checked prompts fit.

        Args:
            limit: maximum number of tokens; None changes nothing.
            why: reason for the limit, for error messages.
        """
        if limit is not None and limit < self.rules.limit:
            self.rules = replace(self.rules, limit=limit, why=why)

    def require(self, check: Callable[[Row], object]) -> None:
        """Run ``check`` on the checked rows now, and on every row that is drawn later.

        Raises:
            BadRow: ``check`` refuses a checked row.
        """
        for number, (row, _) in self.checked_rows():
            self._asked(check, row, number)
        self.rules = replace(self.rules, checks=(*self.rules.checks, check))

    def ask(self, check: Callable[[Row], object], rows: Sequence[Row]) -> None:
        """Run ``check`` once on those of ``rows`` that belong to this set.

        Raises:
            BadRow: ``check`` refuses a row.
        """
        chosen = {id(row) for row in rows}
        for number, (row, _) in self.checked_rows():
            if id(row) in chosen:
                chosen.discard(id(row))  # a list may hold one row several times
                self._asked(check, row, number)

    def checked_rows(self) -> Iterator[tuple[int, EncodedPrompt]]:
        """Yield the row number and the prompt of each usable checked row."""
        return zip(self._numbers, self.sample, strict=True)

    def bad_row(self, number: int, reason: object) -> BadRow:
        """Return an error that names a row of the source and the reason."""
        where = self.source.where(number) if isinstance(self.source, PromptSource) else ""
        place = f" ({where})" if where else ""
        return BadRow(f"row {number} of `{self.name}`{place}: {reason}")

    def left_out(self) -> str:
        """Return a line on the prompts that are dropped as too long; empty if there are none."""
        if not self.overlong:
            return ""
        # Each has more tokens than its limit, so more than the lowest limit.
        limits = [self.rules.broken_by(tokens) for _, tokens in self.overlong]
        count, limit = len(self.overlong), min(found[0] for found in limits if found)
        if self.whole:
            return (
                f"{self.name}: {count} of {self.checked} prompts are left out because they have "
                f"more than {limit} tokens"
            )
        return (
            f"{self.name}: {count} of {self.checked} checked prompts (of {len(self.source)}) have "
            f"more than {limit} tokens; the run leaves such prompts out when it draws them"
        )

    def _too_long(self) -> str:
        number, tokens = self.overlong[0]
        limit, why = self.rules.broken_by(tokens) or (self.rules.limit, self.rules.why)
        seen = "" if self.whole else f" checked, in {len(self.source)} rows"
        return (
            f"`{self.name}` must have at most {limit} tokens a prompt ({why}): got {tokens} in row "
            f"{number} (above the limit: {len(self.overlong)} of {self.checked}{seen}). Set "
            "`overlong_prompts: drop`, or lower `max_tokens`."
        )

    def _encoded(self, number: int) -> EncodedPrompt:
        try:
            row = self.source[number]
            if not isinstance(row, Mapping):
                raise ConfigurationError(
                    f"a row must be a mapping of columns: got {row!r:.80}. Return a dict."
                )
            ids = encode_prompt(self.tokenizer, row, self.rules.ends)
            for model, rows in self.rules.vocabularies.items():
                check_ids(ids, rows, model, self.tokenizer)
        except ConfigurationError as error:
            raise self.bad_row(number, error) from error
        except Exception as error:  # a user's source may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise self.bad_row(
                number, f"it must be readable: got {reason}. Fix the source, or remove the row."
            ) from error
        for check in self.rules.checks:
            self._asked(check, row, number)
        return row, ids

    def _asked(self, check: Callable[[Row], object], row: Row, number: int) -> None:
        try:
            check(row)
        except ConfigurationError as error:
            raise self.bad_row(number, error) from error


def sample_rows(count: int, most: int, seed: int) -> list[int]:
    """Return the numbers of the first and the last of ``count`` rows and of ``most`` others.

    >>> sample_rows(4, 4, seed=0), len(sample_rows(10**9, 100, seed=0))
    ([0, 1, 2, 3], 102)
    """
    if count <= most + 2:
        return list(range(count))
    others = random.Random(seed).sample(range(1, count - 1), most)
    return [0, *sorted(others), count - 1]


def check_ids(ids: Sequence[int], rows: int, model: str, tokenizer: HFTokenizer) -> None:
    """Check that a model has an embedding for every token; a GPU would only fail an assertion.

    Args:
        ids: token ids of one prompt or completion.
        rows: number of rows of the model's embedding.
        model: the model's name, for the error message.
        tokenizer: the tokenizer of the ids.

    Raises:
        ConfigurationError: the embedding has no row for a token.
    """
    highest = max(ids, default=-1)
    if highest >= rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise ConfigurationError(
            f"every token must have one of the {rows} rows of the {model}'s embedding: got the "
            f"token {token!r}, id {highest}. Use the model's original tokenizer, or resize the "
            "embedding."
        )
