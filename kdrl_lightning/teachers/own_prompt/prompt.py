"""Writes a teacher's own prompt from the row's prompt, a template and a context."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdrl_lightning.common.untyped import HFTokenizer, Row, Tree
from kdrl_lightning.errors import ConfigurationError, require_count, require_kind
from kdrl_lightning.prompts.encoding import encode_inside, encode_prompt
from kdrl_lightning.prompts.messages import TEMPLATE_ARGS, check_template_args
from kdrl_lightning.prompts.turns import plain
from kdrl_lightning.teachers.own_prompt.contexts import Context

# `Any`: arguments of users' chat templates.

PLACES = re.compile(r"\{(prompt|context)\}")
WITH_CONTEXT = "{prompt}\n\n{context}"


@dataclass(frozen=True)
class TeacherPrompt:
    r"""Writes the prompt that the teacher reads instead of the student's.

    It is written from the row's text, or by the chat template from its messages, never from decoded
    tokens. Braces other than those of ``{prompt}`` and ``{context}`` stay as they are.

    Args:
        context: what the teacher sees besides the prompt; None: nothing.
        template: the text of the last user message, with ``{prompt}`` for the student's and
            ``{context}`` for the context. Or messages that replace it, of which the last one must
            not be the assistant's, because the completion follows. None: the prompt, an empty line
            and the context.
        template_args: arguments of the chat template for the teacher, e.g.
            ``enable_thinking: false``; they replace the row's of the same name.
        prefix: text after the prompt, in front of the completion, e.g. an empty think block for a
            teacher in non-thinking mode.
        max_tokens: longest prompt; a completion whose prompt is longer is scored without a context.
            Nothing is truncated. None: as long as the teacher can read.

    Raises:
        ConfigurationError: ``context`` or ``template`` has another type, the template does not fit
            the context or ends with an assistant message, or ``max_tokens`` is below 1.
    """

    context: Context | None = None
    template: str | list[dict[str, str]] | None = None
    template_args: Tree | None = None
    prefix: str = ""
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            require_count("max_tokens", self.max_tokens, 1, float("inf"))
        if self.context is not None:
            require_kind("context", self.context, Context, "Give one, e.g. a ColumnContext.")
        _check_form(self.form)
        check_template_args(self.template_args or {})
        _check_template(self.form, self.context is not None)

    @property
    def form(self) -> str | Sequence[Mapping[str, str]]:
        """The template; without one, the prompt followed by the context, if there is any."""
        if self.template is not None:
            return self.template
        return "{prompt}" if self.context is None else WITH_CONTEXT

    @property
    def same(self) -> bool:
        """Whether the teacher reads exactly the student's prompt."""
        return self.form == "{prompt}" and not self.template_args and not self.prefix

    def ids(self, tokenizer: HFTokenizer, row: Row, context: str = "") -> list[int]:
        """Return the token ids of the teacher's prompt.

        Args:
            tokenizer: the one that the teacher reads with.
            row: the prompt's row.
            context: the text to put in place of ``{context}``.

        Raises:
            ConfigurationError: the prompt cannot be rendered.
        """
        prompt = plain(row["prompt"])
        changes: dict[str, object] = {"prompt": self._written(prompt, context)}
        if self.template_args and not isinstance(prompt, str):
            given = plain(row.get(TEMPLATE_ARGS))
            args = given if isinstance(given, dict) else {}
            changes[TEMPLATE_ARGS] = {**args, **self.template_args}
        ids = encode_prompt(tokenizer, {**row, **changes})
        if not self.prefix:
            return ids
        return [*ids, *encode_inside(tokenizer, self.prefix)]

    def _written(self, prompt: Any, context: str) -> object:
        """Return the prompt's text or messages, with the template around the question."""
        if isinstance(prompt, str):
            if isinstance(self.form, str):
                return filled(self.form, prompt, context)
            raise ConfigurationError(
                "`template` must be a string for plain-text prompts: got messages. Write a string, "
                "or set `chat: true` on the prompts."
            )
        turns = list(prompt)
        if self.form == "{prompt}":
            return turns
        asked = [i for i, turn in enumerate(turns) if _role(turn) == "user"]
        if not asked:
            raise ConfigurationError(
                "a prompt must have a user message for the teacher's `template`: got the roles "
                f"{', '.join(str(_role(turn)) for turn in turns)}. Remove the row."
            )
        place = asked[-1]
        question = _text(turns[place])
        new = [
            {**turn, "content": filled(turn["content"], question, context)}
            for turn in self._messages()
        ]
        return [*turns[:place], *new, *turns[place + 1 :]]

    def _messages(self) -> Sequence[Mapping[str, str]]:
        if isinstance(self.form, str):
            return [{"role": "user", "content": self.form}]
        return self.form


def filled(template: str, prompt: str, context: str) -> str:
    r"""Return a template with its placeholders filled; those in inserted texts stay as they are.

    >>> filled("{prompt}\n{context} \\boxed{5}", "Is {context} a word?", "Yes.")
    'Is {context} a word?\nYes. \\boxed{5}'
    """
    texts = {"prompt": prompt, "context": context}
    return PLACES.sub(lambda place: texts[place[1]], template)


def _check_form(template: object) -> None:
    """Refuse a template that is neither a text nor messages of texts."""
    if isinstance(template, str):
        return
    if not isinstance(template, Sequence) or not all(isinstance(m, Mapping) for m in template):
        raise ConfigurationError(
            f"`template` must be a text or a list of messages: got {template!r:.60}. Write a text "
            "with {prompt} and {context}."
        )
    for message in template:
        if set(message) != {"role", "content"}:
            raise ConfigurationError(
                "`template` must have messages with `role` and `content`: got "
                f"{sorted(map(str, message))}. Rename the keys."
            )
        if not isinstance(message["content"], str):
            raise ConfigurationError(
                f"`template` must have messages of text: got {message['content']!r:.60}. Write a "
                "text."
            )


def _check_template(template: str | Sequence[Mapping[str, str]], has_context: bool) -> None:
    """Refuse a template whose placeholders do not fit the context, or that ends with an answer."""
    messages = [] if isinstance(template, str) else template
    text = template if isinstance(template, str) else "".join(m["content"] for m in messages)
    found = set(PLACES.findall(text))
    if "prompt" not in found:
        raise ConfigurationError(
            "`template` must have the placeholder {prompt} for the student's prompt: got "
            f"{text!r:.80}. Add it."
        )
    if has_context and "context" not in found:
        raise ConfigurationError(
            f"`template` must have the placeholder {{context}} for the context: got {text!r:.80}. "
            "Add it, or leave `context` out."
        )
    if not has_context and "context" in found:
        raise ConfigurationError(
            f"`template` must be without {{context}} if there is no `context`: got {text!r:.80}. "
            "Give a `context`, e.g. a ColumnContext."
        )
    if messages and messages[-1]["role"] == "assistant":
        raise ConfigurationError(
            "`template` must end where the completion follows: got an assistant message at the "
            "end. End with a user message."
        )


def _role(turn: Any) -> object:
    return turn.get("role") if isinstance(turn, Mapping) else None


def _text(turn: Mapping[str, Any]) -> str:
    """Return the text of a message, whose content may be a list of parts."""
    content = turn.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise ConfigurationError(
                f"the teacher's prompt must contain only text: got {content!r:.60}. Remove such "
                "rows."
            )
        return "".join(map(str, parts))
    return str(content or "")
