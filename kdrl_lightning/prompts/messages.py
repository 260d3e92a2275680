"""Turns a question into a prompt: text or chat messages, with a system message and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdrl_lightning.common.untyped import Row
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.prompts.turns import is_json_of_messages, plain

# `Any`: arguments of users' chat templates, and the content of users' messages.

# A row's column with arguments of the chat template.
TEMPLATE_ARGS = "template_args"
# The argument or column that lets the model continue the assistant's last message.
CONTINUE = "continue_final_message"
# Arguments of `apply_chat_template` that a user must not set.
OURS = {"add_generation_prompt", "tokenize", "return_dict", "return_tensors", "padding"}


def check_template_args(arguments: object, where: str = "") -> None:
    """Check the arguments of a chat template.

    Args:
        arguments: the arguments by name.
        where: words before the setting's name, e.g. ``the column ``.

    Raises:
        ConfigurationError: they are not a mapping of names, contain an argument that we set, or
            their chat template is not a text.
    """
    named = isinstance(arguments, Mapping) and all(isinstance(name, str) for name in arguments)
    if not isinstance(arguments, Mapping) or not named or set(arguments) & OURS:
        raise ConfigurationError(
            f"{where}`{TEMPLATE_ARGS}` must map names of the chat template's arguments to values, "
            f"without {', '.join(sorted(OURS))}: got {arguments!r:.80}. Correct the names."
        )
    template = arguments.get("chat_template", "")
    if not isinstance(template, str):
        raise ConfigurationError(
            f"{where}`{TEMPLATE_ARGS}` must have a text as `chat_template`: got {template!r:.80}. "
            "Write the template, or remove it to use the tokenizer's."
        )


class PromptForm:
    r"""Turns questions into prompts, all in the same form.

    Args:
        chat: make chat messages for the tokenizer's chat template; otherwise plain text.
        system: system message of a chat, unless the question has one (needs ``chat``).
        template_args: arguments of the chat template, e.g. ``enable_thinking: false`` (needs
            ``chat``).
        examples: solved questions before the question, each with ``prompt`` and ``answer``: turns
            of a chat, or text with an empty line after each.
        suffix: text to add to every question, e.g. the form that the answer must have.
        prefill: beginning of every answer, which the model continues (needs ``chat``). The reward
            does not see it as part of the completion.

    Raises:
        ConfigurationError: a setting needs ``chat``, or an example does not have both texts.

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
        prefill: str | None = None,
    ) -> None:
        needs_chat = {"system": system, "template_args": template_args, "prefill": prefill}
        for name, value in needs_chat.items():
            if value is not None and not chat:
                raise ConfigurationError(
                    f"`{name}` must go with `chat: true`: got {value!r}. Set `chat: true`."
                )
        check_template_args(template_args or {})
        for example in examples:
            if set(example) != {"prompt", "answer"}:
                raise ConfigurationError(
                    "`examples` must have `prompt` and `answer` each: got "
                    f"{sorted(map(str, example))}. Rename the keys."
                )
            for name, text in example.items():
                if not isinstance(text, str):
                    raise ConfigurationError(
                        f"`examples` must be text: got the {name} {text!r}. Quote it."
                    )
        self.chat = chat
        self.system = system
        self.template_args = dict(template_args or {})
        self.examples = [dict(example) for example in examples]
        self.suffix = suffix
        self.prefill = prefill

    def __call__(self, question: object) -> object:
        """Return the prompt of a question, which is a text or the last messages of a chat."""
        if hasattr(question, "tolist"):
            question = plain(question)
        if isinstance(question, str):
            if not question.strip() or is_json_of_messages(question):
                return question  # the encoding refuses it; a suffix would hide the mistake
            text = question + self.suffix
            return self._chat([message("user", text)]) if self.chat else self._text(text)
        if isinstance(question, list | tuple):
            turns = self._with_suffix(list(question))
            return self._chat(turns) if self.chat else turns
        return question  # the encoding refuses it

    def row(self, row: Row, question: object) -> Row:
        """Return the row with its prompt, and with the template's arguments if there are any."""
        extra: dict[str, object] = {TEMPLATE_ARGS: self.template_args} if self.template_args else {}
        if self.prefill:
            extra[CONTINUE] = True
        return {**row, "prompt": self(question), **extra}

    def _with_suffix(self, turns: list[Any]) -> list[Any]:
        last = turns[-1] if turns else None
        if not self.suffix or not isinstance(last, Mapping) or last.get("role") != "user":
            return turns
        content = plain(last.get("content"))
        if isinstance(content, str):
            return [*turns[:-1], {**last, "content": content + self.suffix}]
        if isinstance(content, list) and content:
            part = {"type": "text", "text": self.suffix}
            return [*turns[:-1], {**last, "content": [*content, part]}]
        return turns  # the encoding refuses it

    def _chat(self, turns: list[Any]) -> list[Any]:
        system = [] if self.system is None else [message("system", self.system)]
        first = turns[0].get("role") if turns and isinstance(turns[0], Mapping) else None
        if first in ("system", "developer"):
            system, turns = turns[:1], turns[1:]
        shots = [
            turn
            for example in self.examples
            for turn in (
                message("user", example["prompt"] + self.suffix),
                message("assistant", example["answer"]),
            )
        ]
        begun = [message("assistant", self.prefill)] if self.prefill else []
        return [*system, *shots, *turns, *begun]

    def _text(self, question: str) -> str:
        shots = [e["prompt"] + self.suffix + e["answer"] for e in self.examples]
        return "\n\n".join([*shots, question])


def message(role: str, content: str) -> dict[str, str]:
    """Return one message of a chat."""
    return {"role": role, "content": content}
