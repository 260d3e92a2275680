"""From a question to a prompt, and into token ids."""

from __future__ import annotations

from typing import Any

import pytest

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.prompts import encode_prompt
from kdrl_lightning.prompts.messages import PromptForm
from kdrl_lightning.tiny.models import make_tokenizer

EXAMPLES = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_examples_as_text() -> None:
    form = PromptForm(examples=EXAMPLES, suffix="?")
    assert form("3+3=") == "1+1=?2\n\n2+2=?4\n\n3+3=?"


def test_examples_as_turns_of_a_chat() -> None:
    form = PromptForm(chat=True, system="Add.", examples=EXAMPLES, suffix="?")
    assert form("3+3=") == [
        turn("system", "Add."),
        turn("user", "1+1=?"),
        turn("assistant", "2"),
        turn("user", "2+2=?"),
        turn("assistant", "4"),
        turn("user", "3+3=?"),
    ]


def test_messages_are_the_end_of_the_chat_and_keep_their_own_system() -> None:
    own = [turn("system", "Mine."), turn("user", "3+3=")]
    form = PromptForm(chat=True, system="Add.", examples=EXAMPLES[:1])
    assert form(own) == [own[0], turn("user", "1+1="), turn("assistant", "2"), own[1]]
    assert form(own[1:])[0] == turn("system", "Add.")
    assert PromptForm(examples=EXAMPLES)(own) == own


def test_the_row_keeps_its_columns_and_carries_the_templates_arguments() -> None:
    form = PromptForm(chat=True, template_args={"enable_thinking": False})
    row = form.row({"answer": "6"}, "3+3=")
    assert row == {
        "answer": "6",
        "prompt": [turn("user", "3+3=")],
        "template_args": {"enable_thinking": False},
    }
    assert "template_args" not in PromptForm(chat=True).row({}, "3+3=")


def test_the_templates_arguments_reach_the_template() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if think is false %}#{% endif %}"
    )
    row: dict[str, Any] = {"prompt": [turn("user", "1+")]}
    assert encode_prompt(tokenizer, row) == [3, 12]
    assert encode_prompt(tokenizer, {**row, "template_args": {"think": False}}) == [3, 12, 15]


@pytest.mark.parametrize("example", [{"prompt": "1"}, {"prompt": "1", "answer": "2", "more": "3"}])
def test_an_example_without_an_answer_is_refused(example: dict[str, str]) -> None:
    words = rf"`examples` must have `prompt` and `answer` each: got \['{sorted(example)[0]}'"
    with pytest.raises(ConfigurationError, match=words):
        PromptForm(examples=[example])
