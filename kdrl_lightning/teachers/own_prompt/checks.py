"""Checks of a teacher's own prompts before a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kdrl_lightning.common.untyped import HFTokenizer, Row
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.prompts.base import first_of_each_kind
from kdrl_lightning.prompts.encoding import warn_of_ignored
from kdrl_lightning.prompts.messages import TEMPLATE_ARGS
from kdrl_lightning.prompts.prompt_set import check_ids
from kdrl_lightning.prompts.turns import plain
from kdrl_lightning.teachers.own_prompt.contexts import FixedContext, RowContext
from kdrl_lightning.teachers.own_prompt.prompt import TeacherPrompt

# A context of at least this many characters must not be in the student's prompt. A shorter one may,
# e.g. the answer to a multiple-choice question.
SHOWN_FROM = 12


def check_row(
    prompt: TeacherPrompt, row: Row, tokenizer: HFTokenizer, vocabulary: int | None
) -> None:
    """Check that the teacher's prompt of a row can be written and read.

    Args:
        prompt: the settings of the teacher's prompt.
        row: a row of the training prompts.
        tokenizer: the one that the teacher reads with.
        vocabulary: rows of the teacher's embedding; None if unknown.

    Raises:
        ConfigurationError: the prompt cannot be written, or has an id without a row.
    """
    for context in _of_rows(prompt):
        context.of_row(row)
    ids = prompt.ids(tokenizer, row, _known(prompt, row) or "1")
    if vocabulary is not None:
        check_ids(ids, vocabulary, "teacher", tokenizer)


def check_rows(
    prompt: TeacherPrompt, rows: Sequence[Row], tokenizer: HFTokenizer, limit: float
) -> str:
    """Check the contexts that depend only on the rows.

    Args:
        prompt: the settings of the teacher's prompt.
        rows: the checked rows of the training prompts.
        tokenizer: the one that the teacher reads with.
        limit: maximum number of tokens of a prompt.

    Returns:
        A line that says how many rows the teacher has no context for; empty if there are none.

    Raises:
        ConfigurationError: no row has a context, all have it in the student's prompt, or all
            prompts are too long.
    """
    if prompt.template_args:
        warn_of_ignored([{TEMPLATE_ARGS: prompt.template_args}], tokenizer)
    for context in _of_rows(prompt):
        _check_context(context, rows)
    if isinstance(prompt.context, RowContext):
        texts = [prompt.context.of_row(row) for row in rows]
    else:  # there are no siblings and no feedback before a rollout: "1" stands for them
        rows = first_of_each_kind(rows)
        texts = [_known(prompt, row) or "1" for row in rows]
    pairs = [(row, text) for row, text in zip(rows, texts, strict=True) if text is not None]
    lengths = [len(prompt.ids(tokenizer, row, text)) for row, text in pairs]
    if lengths and min(lengths) > limit:
        raise ConfigurationError(
            f"`max_tokens` of the teacher's prompt must be at least the shortest prompt: got "
            f"{limit:g}, below {min(lengths)} tokens. Raise it, or give a shorter context."
        )
    without, long = texts.count(None), sum(length > limit for length in lengths)
    if not without and not long:
        return ""
    return (
        f"the teacher has no context for {without + long} of {len(texts)} checked prompts "
        f"({without} without one, {long} above {limit:g} tokens), which are not imitated"
    )


def _check_context(context: RowContext, rows: Sequence[Row]) -> None:
    """Refuse a context that no row has, or that the student sees in every row."""
    texts = [context.of_row(row) for row in rows]
    having = [(row, text) for row, text in zip(rows, texts, strict=True) if text is not None]
    if not having:
        column = getattr(context, "column", None)
        raise ConfigurationError(
            f"the column `{column}` must have text for the teacher's context in at least one row: "
            f"got none in {len(rows)} checked rows with the columns "
            f"{', '.join(sorted(map(str, rows[0])))}. Name another column, or fill it."
        )
    least = 0 if isinstance(context, FixedContext) else SHOWN_FROM
    if all(len(text) >= least and shown(text, row) for row, text in having):
        text = having[0][1]
        raise ConfigurationError(
            f"the teacher's context must not be in the student's prompt already: got {text!r:.60} "
            f"in it, as in all {len(having)} checked rows with a context. Take it out of the "
            "prompts, or give another context."
        )


def shown(text: str, row: Row) -> bool:
    """Return whether the student's prompt shows a text, up to white space.

    >>> shown("1 + 1", {"prompt": [{"role": "user", "content": "What is 1  + 1?"}]})
    True
    """
    prompt = plain(row["prompt"])
    turns = [prompt] if isinstance(prompt, str) else [_content(turn) for turn in prompt]
    wanted = " ".join(text.split())
    return any(wanted in " ".join(turn.split()) for turn in turns)


def _content(turn: object) -> str:
    return str(turn.get("content") or "") if isinstance(turn, Mapping) else ""


def _known(prompt: TeacherPrompt, row: Row) -> str:
    """Return the parts of a row's context that are known before a completion is sampled."""
    return "\n\n".join(filter(None, (context.of_row(row) for context in _of_rows(prompt))))


def _of_rows(prompt: TeacherPrompt) -> list[RowContext]:
    parts = [] if prompt.context is None else prompt.context.parts()
    return [part for part in parts if isinstance(part, RowContext)]
