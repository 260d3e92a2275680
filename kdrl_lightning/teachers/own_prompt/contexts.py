"""What a teacher reads besides the prompt: a reference, an instruction, a sibling, feedback."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from kdrl_lightning.common.untyped import Row
from kdrl_lightning.errors import ConfigurationError, require_between, require_kind
from kdrl_lightning.prompts.turns import plain
from kdrl_lightning.rewards.answers.references import missing
from kdrl_lightning.teachers.own_prompt.groups import Group


class Context(ABC):
    """Gives each completion of a group what its teacher may read besides the prompt.

    Attributes:
        reads_siblings: the context is another completion of the group.
        reads_feedback: the context is what the reward says about the completion.
        reads_others: the context is about another prompt.
    """

    reads_siblings: bool = False
    reads_feedback: bool = False
    reads_others: bool = False

    @abstractmethod
    def of_group(self, group: Group) -> list[str | None]:
        """Return a text for each completion; None for one that has no context."""

    def parts(self) -> Iterator[Context]:
        """Yield this context and all contexts in it."""
        yield self


class RowContext(Context):
    """A context that depends only on the prompt's row, so it is known before a run."""

    @abstractmethod
    def of_row(self, row: Row) -> str | None:
        """Return the text of a row; None if it has none."""

    def of_group(self, group: Group) -> list[str | None]:
        """Return the text of the group's row for each completion."""
        return [self.of_row(attempt.row) for attempt in group.attempts]


class ColumnContext(RowContext):
    """Shows a column of the row, e.g. the reference solution: OPSD (arXiv 2601.18734).

    An empty cell (also None, NaN or pandas' NA), or a row without the column, has no context.

    Args:
        column: name of the column.
    """

    def __init__(self, column: str) -> None:
        self.column = column

    def of_row(self, row: Row) -> str | None:
        """Return the cell as text.

        Raises:
            ConfigurationError: the cell holds neither a text nor a number.
        """
        value = plain(row.get(self.column))
        if missing(value):
            return None
        if not isinstance(value, str | int | float):
            raise ConfigurationError(
                f"the column `{self.column}` must hold text for the teacher's context: got "
                f"{value!r:.60}. Convert it, or name another column."
            )
        return str(value).strip() or None


class FixedContext(RowContext):
    """Shows the same text for every prompt, e.g. an instruction to be brief (arXiv 2603.05433).

    Args:
        text: the text.

    Raises:
        ConfigurationError: the text is empty.
    """

    def __init__(self, text: str) -> None:
        if not text.strip():
            raise ConfigurationError(
                f"`text` of a FixedContext must not be empty: got {text!r}. Write the instruction."
            )
        self.text = text

    def of_row(self, row: Row) -> str | None:
        """Return the text."""
        return self.text


class OtherProblemContext(Context):
    """Shows the inner context of another prompt, as a control experiment.

    If a teacher with such a context helps as much as one with the right context, the content of the
    context is not what helped (arXiv 2608.09228).

    Args:
        context: a context that depends only on the row, such as a ``ColumnContext``.

    Raises:
        ConfigurationError: ``context`` is no ``RowContext``.
    """

    reads_others = True

    def __init__(self, context: RowContext) -> None:
        require_kind("context", context, RowContext, "Give one, e.g. a ColumnContext.")
        self.context = context

    def parts(self) -> Iterator[Context]:
        """Yield this context and the inner one."""
        yield self
        yield from self.context.parts()

    def of_group(self, group: Group) -> list[str | None]:
        """Return the other prompt's text; None if it has none or is the same prompt."""
        other, row = group.other, group.attempts[0].row
        same = other is None or other.get("prompt") == row.get("prompt")
        text = None if other is None or same else self.context.of_row(other)
        return [text] * len(group.attempts)


class SiblingContext(Context):
    """Shows the first other successful completion of the group: SDPO (arXiv 2601.20802).

    A completion is never its own context, so the only success of a group has none. The sibling's
    thinking is cut out; a sibling with nothing but thinking does not count as a success.

    Args:
        threshold: smallest reward of a success.
        thinking: the tags around the thinking.

    Raises:
        ConfigurationError: the threshold is no number, or there are not two tags.
    """

    reads_siblings = True

    def __init__(
        self, threshold: float = 1.0, thinking: Sequence[str] = ("<think>", "</think>")
    ) -> None:
        require_between("threshold", threshold, -1e9, 1e9)
        if len(thinking) != 2 or not all(thinking):
            raise ConfigurationError(
                f"`thinking` must be two tags, one before and one after: got {list(thinking)}. "
                "Give for example [<think>, </think>]."
            )
        self.threshold = threshold
        self.thinking = tuple(thinking)

    def of_group(self, group: Group) -> list[str | None]:
        """Return the first success among the other completions for each completion."""
        successes = [
            (place, text)
            for place, attempt in enumerate(group.attempts)
            if attempt.verdict.reward >= self.threshold
            and (text := without_thinking(attempt.text, *self.thinking))
        ]
        return [
            next((text for other, text in successes if other != place), None)
            for place in range(len(group.attempts))
        ]


class FeedbackContext(Context):
    """Shows what the reward says about this completion: ``Verdict.feedback``."""

    reads_feedback = True

    def of_group(self, group: Group) -> list[str | None]:
        """Return each completion's feedback."""
        return [attempt.verdict.feedback.strip() or None for attempt in group.attempts]


class JoinedContext(Context):
    """Joins several contexts, each below its heading; leaves out those that a completion lacks.

    Args:
        contexts: contexts by heading, e.g. ``{"A correct solution:": SiblingContext()}``; an empty
            heading is left out.

    Raises:
        ConfigurationError: there are no contexts, or one of them is no ``Context``.
    """

    def __init__(self, contexts: dict[str, Context]) -> None:
        if not contexts:
            raise ConfigurationError(
                "`contexts` must have at least one context: got none. Add one."
            )
        for heading, context in contexts.items():
            require_kind(
                f"contexts[{heading!r}]", context, Context, "Give one, e.g. a ColumnContext."
            )
        self.contexts = contexts

    def of_group(self, group: Group) -> list[str | None]:
        """Return the joined texts; None for a completion for which no context has a text."""
        found = {heading: context.of_group(group) for heading, context in self.contexts.items()}
        out = []
        for place in range(len(group.attempts)):
            texts = {heading: texts[place] for heading, texts in found.items()}
            out.append(joined(texts) or None)
        return out

    def parts(self) -> Iterator[Context]:
        """Yield this context and all contexts in it."""
        yield self
        for context in self.contexts.values():
            yield from context.parts()


def joined(texts: Mapping[str, str | None]) -> str:
    r"""Return the texts that are not empty, each below its heading.

    >>> joined({"Solution:": "1+1=2", "Feedback:": None})
    'Solution:\n1+1=2'
    """
    return "\n\n".join(f"{heading}\n{text}".strip() for heading, text in texts.items() if text)


def without_thinking(text: str, before: str = "<think>", after: str = "</think>") -> str:
    r"""Return a completion without its thinking.

    The opening tag may be in the prompt, and the token limit may have cut off the closing one.

    >>> without_thinking("<think>hm</think>\n\n4"), without_thinking("hm</think>4")
    ('4', '4')
    >>> without_thinking("4 <think>is it"), without_thinking("<think>is it")
    ('4', '')
    """
    thought, closed, rest = text.partition(after)
    if closed and before not in thought:
        text = rest
    while before in text:
        head, _, rest = text.partition(before)
        _, closed, tail = rest.partition(after)
        text = head + tail if closed else head
    return text.strip()
