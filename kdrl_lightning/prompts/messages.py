"""From a question to a prompt: plain text or chat messages, with a system message and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdrl_lightning.errors import ConfigurationError

# The row's column with arguments of the chat template.
TEMPLATE_ARGS = "template_args"


class PromptForm:
    r"""How a question is put to the model.

    Args:
        chat: as messages, for the tokenizer's chat template; else as text.
        system: the system message of a chat, unless the question brings its own.
        template_args: arguments of the chat template, e.g. ``enable_thinking: false``.
        examples: solved questions that stand before it, each with ``prompt`` and ``answer``: turns
            of a chat, or text with an empty line behind each.
        suffix: put behind every question, e.g. what the answer must look like.

    >>> PromptForm(examples=[{"prompt": "1+1=", "answer": "2"}])("2+2=")
    '1+1=2\n\n2+2='
    >>> PromptForm(chat=True, system="Be brief.")("2+2=")
    [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': '2+2='}]
    """

    def __init__(
        self,
        chat: bool = False,
        system: str | None = None,
        template_args: Mapping[str, Any] | None = None,
        examples: Sequence[Mapping[str, str]] = (),
        suffix: str = "",
    ) -> None:
        for name, value in (("system", system), ("template_args", template_args)):
            if value is not None and not chat:
                raise ConfigurationError(f"`{name}` must go with `chat: true`: got {value!r}.")
        for example in examples:
            if set(example) != {"prompt", "answer"}:
                raise ConfigurationError(
                    "`examples` must have `prompt` and `answer` each: got "
                    f"{sorted(map(str, example))}."
                )
        self.chat = chat
        self.system = system
        self.template_args = dict(template_args or {})
        self.examples = [dict(example) for example in examples]
        self.suffix = suffix

    def __call__(self, question: Any) -> Any:
        """Return the prompt; a question of messages is the end of the chat."""
        if isinstance(question, str):
            text = question + self.suffix
            return self._chat([message("user", text)]) if self.chat else self._text(text)
        if isinstance(question, list | tuple) and self.chat:
            return self._chat(list(question))
        return question  # messages stay as they are; all else is refused when it is encoded

    def row(self, row: Mapping[str, Any], question: Any) -> dict[str, Any]:
        """Return the row with its prompt, and the template's arguments where there are any."""
        extra = {TEMPLATE_ARGS: self.template_args} if self.template_args else {}
        return {**row, "prompt": self(question), **extra}

    def _chat(self, turns: list[Any]) -> list[Any]:
        system = [] if self.system is None else [message("system", self.system)]
        if turns and isinstance(turns[0], Mapping) and turns[0].get("role") == "system":
            system, turns = turns[:1], turns[1:]
        shots = [
            turn
            for example in self.examples
            for turn in (
                message("user", example["prompt"] + self.suffix),
                message("assistant", example["answer"]),
            )
        ]
        return [*system, *shots, *turns]

    def _text(self, question: str) -> str:
        shots = [e["prompt"] + self.suffix + e["answer"] for e in self.examples]
        return "\n\n".join([*shots, question])


def message(role: str, content: str) -> dict[str, str]:
    """Return one turn of a chat."""
    return {"role": role, "content": content}
