"""Messages: from a question to a prompt, and to token ids."""

from __future__ import annotations

from typing import Any

import numpy as np
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


def test_a_suffix_follows_a_question_of_parts() -> None:
    parts = [{"type": "text", "text": "3+3"}]
    suffix = {"type": "text", "text": "="}
    for content in (parts, np.array(parts, dtype=object)):
        asked = PromptForm(chat=True, suffix="=")([{"role": "user", "content": content}])
        assert asked == [{"role": "user", "content": [*parts, suffix]}]
    assert parts == [{"type": "text", "text": "3+3"}]


def test_a_developers_message_is_the_system_message_of_the_chat() -> None:
    own = [turn("developer", "Add."), turn("user", "3+3=")]
    asked = PromptForm(chat=True, system="Be brief.", examples=EXAMPLES)(own)
    assert asked[0] == own[0] and asked[-1] == own[1]
    assert "system" not in [one["role"] for one in asked]


def test_an_example_that_is_no_text_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^`examples` must be text: got the answer 2\. "):
        PromptForm(examples=[{"prompt": "1+1=", "answer": 2}])  # type: ignore[dict-item]


@pytest.mark.parametrize("value", ['{"think": false}', [1], {"tokenize": False}, 3])
def test_what_is_no_argument_of_the_template_is_refused(value: Any) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    row: dict[str, Any] = {"prompt": [turn("user", "1+")]}
    with pytest.raises(
        ConfigurationError, match="`template_args` must map names of the chat template"
    ):
        encode_prompt(tokenizer, {**row, "template_args": value})
    for nothing in (None, float("nan"), {}):
        assert encode_prompt(tokenizer, {**row, "template_args": nothing}) == [3, 12]
