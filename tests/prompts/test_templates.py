"""Chat templates that leave text out, close the prompt, or ignore a user's settings."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from helpers.word_tokenizer import CHAT, word_tokenizer
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import load_tokenizer
from kdrl_lightning.prompts.encoding import encode_prompt, warn_of_ignored
from kdrl_lightning.prompts.messages import PromptForm
from kdrl_lightning.teachers.own_prompt.prompt import TeacherPrompt

SYSTEM = {"role": "system", "content": "x"}
FIRST = [{"role": "user", "content": "1 + 2"}, {"role": "assistant", "content": "3"}]
LAST = {"role": "user", "content": "2 + 2 ="}


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (("for m in messages", "for m in messages[-1:]"), r"message 0 \(system\), 'x'"),
        (("for m in messages", "for m in messages[1:]"), r"message 0 \(system\), 'x'"),
        (("for m in messages", "for m in []"), r"message 0 \(system\), 'x'"),
        (("m['content'] }}", "m['content'][:3] }}"), r"message 1 \(user\), '1 \+ 2'"),
        (("m['content'] }}", "m['content'].split('2')[0] }}"), r"message 1 \(user\)"),
        (("m['content'] }}", "m['content'] | replace('+', '-') }}"), r"message 1 \(user\)"),
    ],
)
def test_a_template_that_leaves_text_out_is_refused(change: tuple[str, str], lost: str) -> None:
    tokenizer = word_tokenizer(template=CHAT.replace(*change))
    words = rf"^the chat template must render every message as it is: got .* without {lost}"
    with pytest.raises(ConfigurationError, match=words):
        encode_prompt(tokenizer, {"prompt": [SYSTEM, *FIRST, LAST]})


@pytest.mark.parametrize(
    ("change", "turns"),
    [
        (("m['content'] }}", "m['content'] | trim }}"), [{**LAST, "content": " 1 +\n\n 1 "}]),
        # Reasoning of earlier answers, and results of tools.
        (
            ("m['content'] }}", "m['content'].split('x')[-1] }}"),
            [LAST, {**FIRST[1], "content": "x 3"}],
        ),
        (
            ("m['content'] }}", "m['content'].replace('/no_think', '') }}"),
            [SYSTEM | {"content": "/no_think"}],
        ),
    ],
)
def test_a_template_may_change_white_space_switches_and_old_answers(
    change: tuple[str, str], turns: list[Any]
) -> None:
    tokenizer = word_tokenizer(template=CHAT.replace(*change))
    assert encode_prompt(tokenizer, {"prompt": [*turns, LAST]})


def test_a_template_may_write_json() -> None:
    tokenizer = word_tokenizer(template=CHAT.replace("m['content'] }}", "m['content'] | tojson }}"))
    assert encode_prompt(tokenizer, {"prompt": [{"role": "user", "content": 'say "1"\n+'}]})


def test_a_prompt_that_closes_the_turn_with_any_end_token_is_refused() -> None:
    tokenizer = word_tokenizer(template=CHAT.split("{% if add_")[0])
    assert encode_prompt(tokenizer, {"prompt": [LAST]})[-1] == 8
    words = r"^a prompt must not end with the end token ;: got .*Use a chat template that opens"
    with pytest.raises(ConfigurationError, match=words):
        encode_prompt(tokenizer, {"prompt": [LAST]}, ends=(1, 8))
    assert encode_prompt(word_tokenizer(), {"prompt": [LAST]}, ends=(1, 8))[-1] == 10


@pytest.mark.parametrize("prompt", ["1 + \ud83d", [{"role": "user", "content": "1 + \ud83d"}]])
def test_half_of_a_pair_of_surrogates_is_refused(prompt: Any) -> None:
    words = r"^a prompt must be valid Unicode: got '\\ud83d' in character 4\. Fix or remove the row"
    with pytest.raises(ConfigurationError, match=words):
        encode_prompt(word_tokenizer(), {"prompt": prompt})


def test_arguments_that_the_template_does_not_read_are_named() -> None:
    tokenizer = word_tokenizer(template=CHAT + "{{ enable_thinking }}")
    rows = [{"template_args": {"enable_thinking": False, "continue_final_message": True}}, {}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_ignored(rows, tokenizer)
    rows = [*rows, {"template_args": {"enable_thinkng": False, "a": None}}]
    words = r"`template_args` have no effect: the chat template does not read enable_thinkng\. Corr"
    with pytest.warns(UserWarning, match=words):
        warn_of_ignored(rows, tokenizer)


@pytest.mark.parametrize(
    ("turns", "lost"),
    [
        ([{"role": "system", "content": "1"}, LAST], r"message 0 \(system\), '1'"),
        ([{"role": "user", "content": "2"}, LAST], r"message 0 \(user\), '2'"),
        ([LAST, FIRST[1], LAST], r"message 2 \(user\), '2 \+ 2 ='"),
    ],
)
def test_a_message_is_not_found_inside_of_another(turns: list[Any], lost: str) -> None:
    row = {"prompt": turns}
    assert encode_prompt(word_tokenizer(), row)
    tokenizer = word_tokenizer(template=CHAT.replace("for m in messages", "for m in messages[-1:]"))
    with pytest.raises(ConfigurationError, match=rf"render every message as it is: .*{lost}"):
        encode_prompt(tokenizer, row)


def test_json_in_a_template_may_hold_any_letters() -> None:
    tokenizer = word_tokenizer(template=CHAT.replace("m['content'] }}", "m['content'] | tojson }}"))
    assert encode_prompt(tokenizer, {"prompt": [{"role": "user", "content": 'né "1"\n+'}]})


GEMMA = (
    CHAT.replace("'tool': 't'}", "'tool': 't', 'model': 'model', 'note': 'x'}")
    .replace("}}a{% endif", "}}model{% endif")
    .replace("%}a{% endif", "%}model{% endif")
)


def test_an_answer_in_a_role_of_the_template_is_refused() -> None:
    tokenizer = word_tokenizer(template=GEMMA)
    answered = [LAST, {"role": "model", "content": "4"}]
    with pytest.raises(ConfigurationError, match="must not end with an assistant message"):
        encode_prompt(tokenizer, {"prompt": answered})
    assert encode_prompt(tokenizer, {"prompt": [LAST, {"role": "note", "content": "1"}]})
    ids = encode_prompt(tokenizer, {"prompt": answered, "continue_final_message": True})
    assert tokenizer.decode(ids).endswith("?")  # the model goes on after the 4, a word it lacks


@pytest.mark.parametrize("chat", [False, True])
def test_characters_that_the_tokenizer_drops_are_refused(student_folder: str, chat: bool) -> None:
    tokenizer = load_tokenizer(student_folder)  # of digits, without an unknown token
    tokenizer.chat_template = "{% for m in messages %}<u>{{ m.content }}{% endfor %}"

    def encoded(text: str) -> list[int]:
        row = {"prompt": [{"role": "user", "content": text}] if chat else text}
        return encode_prompt(tokenizer, row)

    assert encoded("1 + 1 =\n") == encoded("1+1=")
    words = r"^the tokenizer must know every character of a prompt: got 'W', 's', which it would "
    with pytest.raises(ConfigurationError, match=words):
        encoded("Ws 1+1=")
    tokenizer.add_tokens(["<more>"])  # letters of an added token are known
    assert encoded("<more>1=")


def test_a_part_of_text_without_a_text_is_named() -> None:
    parts = [{"type": "text", "text": "1"}, {"type": "text", "text": None}]
    words = r"got a part of type text without a text, \{'type': 'text'\}, in message 0"
    with pytest.raises(ConfigurationError, match=words):
        encode_prompt(word_tokenizer(), {"prompt": [{"role": "user", "content": parts}]})


# As templates of multimodal models: contents are lists of parts.
FIRST_PART = CHAT.replace("m['content']", "m['content'][0]['text']")
EACH_PART = CHAT.replace(
    "{{ m['content'] }}", "{% for p in m['content'] if p.type == 'text' %}{{ p.text }}{% endfor %}"
)
STRICT = "{% if messages[0]['content'] is string %}{{ raise_exception('no') }}{% endif %}"


@pytest.mark.parametrize("template", [FIRST_PART, EACH_PART, STRICT + EACH_PART])
def test_a_template_of_parts_gives_the_tokens_of_one_of_texts(template: str) -> None:
    tokenizer, usual = word_tokenizer(template=template), word_tokenizer()
    parts = [{"role": "user", "content": [{"type": "text", "text": "2 + 2 ="}]}]
    begun = [*FIRST, LAST, {"role": "assistant", "content": "x 1"}]
    for row in (
        {"prompt": [SYSTEM, *FIRST, LAST]},
        {"prompt": parts},
        {"prompt": begun, "continue_final_message": True},
    ):
        assert encode_prompt(tokenizer, row) == encode_prompt(usual, row)
    with pytest.raises(ConfigurationError, match="must not end with an assistant message"):
        encode_prompt(tokenizer, {"prompt": FIRST})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"chat_template": 5}, "must have a text as `chat_template`: got 5. Write the template"),
        ({"chat_template": ["x"]}, "must have a text as `chat_template`: got "),
        ({"tokenize": False}, "must map names of the chat template's arguments to values"),
        ({5: True}, "must map names of the chat template's arguments to values"),
    ],
)
def test_arguments_that_no_template_takes_are_refused_at_the_start(
    arguments: dict[Any, Any], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"^`template_args` {words}"):
        PromptForm(chat=True, template_args=arguments)
    with pytest.raises(ConfigurationError, match=f"^`template_args` {words}"):
        TeacherPrompt(template_args=arguments)
    with pytest.raises(ConfigurationError, match=f"^the column `template_args` {words}"):
        encode_prompt(word_tokenizer(), {"prompt": [LAST], "template_args": arguments})
