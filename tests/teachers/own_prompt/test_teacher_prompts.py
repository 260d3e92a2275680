"""How a teacher's prompt is written: by the chat template, around the student's question."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.word_tokenizer import CHAT, word_tokenizer
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.prompts.encoding import encode_prompt
from kdrl_lightning.teachers import (
    ColumnContext,
    FeedbackContext,
    FixedContext,
    JoinedContext,
    OtherProblemContext,
    SiblingContext,
    TeacherPrompt,
)
from kdrl_lightning.teachers.own_prompt.checks import check_row, check_rows

ROW = {"prompt": [{"role": "user", "content": "1 +"}], "solution": "2 3"}
SHOWN = ColumnContext("solution")


def words(prompt: TeacherPrompt, row: dict[str, Any], context: str = "", **tokenizer: Any) -> str:
    made = word_tokenizer(**tokenizer)
    return " ".join(made.convert_ids_to_tokens(prompt.ids(made, row, context)))


def ask(*turns: str) -> dict[str, Any]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return {"prompt": [{"role": roles[t[0]], "content": t[2:]} for t in turns]}


def test_the_context_comes_after_the_question() -> None:
    assert words(TeacherPrompt(SHOWN), ROW, "2 3") == "<bos> u 1 + 2 3 ; a"


def test_the_last_message_of_the_user_is_the_question() -> None:
    row = ask("s x", "u 1", "a 2", "u 3")
    prompt = TeacherPrompt(SHOWN, "{context} = {prompt}")
    assert words(prompt, row, "+ +") == "<bos> s x ; u 1 ; a 2 ; u + + = 3 ; a"


def test_messages_can_take_the_place_of_the_question() -> None:
    template = [
        {"role": "user", "content": "{prompt}"},
        {"role": "assistant", "content": "{context}"},
        {"role": "user", "content": "{prompt} ?"},
    ]
    got = words(TeacherPrompt(SHOWN, template), ask("s x", "u 1 +"), "2")
    assert got == "<bos> s x ; u 1 + ; a 2 ; u 1 + ? ; a"


def test_the_beginning_of_the_answer_stays_in_front_of_the_completion() -> None:
    row = {**ask("u 1 +", "a 2"), "continue_final_message": True}
    template = CHAT.replace("; {% endfor %}", "{% if not loop.last %}; {% endif %}{% endfor %}")
    got = words(TeacherPrompt(SHOWN), row, "3", template=template)
    assert got == "<bos> u 1 + 3 ; a 2"


def test_a_text_has_no_roles() -> None:
    prompt = TeacherPrompt(SHOWN, "{context} ; {prompt}")
    assert words(prompt, {"prompt": "1 + 1 ="}, "2", around="<bos> $A") == "<bos> 2 ; 1 + 1 ="


def test_what_is_filled_in_is_not_read_again() -> None:
    prompt = TeacherPrompt(SHOWN, "{context} {prompt} {x}")
    assert prompt._written("{context}", "{prompt}") == "{prompt} {context} {x}"


@pytest.mark.parametrize("row", [ROW, ask("s x", "u 1", "a 2", "u 3"), {"prompt": "1 + 1 ="}])
def test_the_plain_template_writes_the_students_prompt(row: dict[str, Any]) -> None:
    tokenizer = word_tokenizer("<bos> $A")
    for prompt in (TeacherPrompt(), TeacherPrompt(template="{prompt}")):
        assert prompt.same and prompt.ids(tokenizer, row) == encode_prompt(tokenizer, row)


def test_a_prefix_follows_the_generation_prompt() -> None:
    # As a template writes it for a model in non-thinking mode.
    prompt, row = TeacherPrompt(prefix="t T "), ask("u 1 +")
    thinks = CHAT.replace("a{% endif %}", "a{% if off %} t T {% endif %}{% endif %}")
    assert words(prompt, row) == "<bos> u 1 + ; a t T"
    by_template = TeacherPrompt(template_args={"off": True})
    assert words(prompt, row) == words(by_template, row, template=thinks)
    assert not prompt.same and not by_template.same


def test_the_teachers_template_args_come_before_the_rows() -> None:
    template = CHAT.replace("{% if add", "{{ kind }}{{ more }} {% if add")
    row = {**ask("u 1"), "template_args": {"kind": "t", "more": "T"}}
    assert words(TeacherPrompt(), row, template=template) == "<bos> u 1 ; tT a".replace("tT", "?")
    row["template_args"] = {"kind": "t", "more": ""}
    got = words(TeacherPrompt(template_args={"kind": "T"}), row, template=template)
    assert got == "<bos> u 1 ; T a"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": SHOWN, "template": "{context}"}, r"must have the placeholder \{prompt\}"),
        ({"context": SHOWN, "template": ""}, r"must have the placeholder \{prompt\}.*got ''"),
        ({"template": []}, r"must have the placeholder \{prompt\}.*got ''"),
        ({"context": SHOWN, "template": "{prompt}"}, r"must have the placeholder \{context\}"),
        ({"template": "{prompt}{context}"}, r"must be without \{context\}"),
        ({"max_tokens": 0}, r"`max_tokens` must be at least 1: got 0"),
        (
            {
                "context": SHOWN,
                "template": [
                    {"role": "user", "content": "{prompt}"},
                    {"role": "assistant", "content": "{context}"},
                ],
            },
            r"`template` must end where the completion follows: got an assistant message",
        ),
        ({"template": 5}, r"^`template` must be a text or a list of messages: got 5\. Write"),
        ({"template": ["{prompt}"]}, r"must be a text or a list of messages: got \['\{prompt"),
        ({"template": [{"role": "user", "content": 5}]}, r"must have messages of text: got 5\."),
        ({"context": "solution"}, r"^`context` must be a Context: got 'solution'\. Give one"),
        ({"max_tokens": 8.5}, r"^`max_tokens` must be a whole number: got 8\.5"),
        (
            {"template": [{"role": "user", "text": "{prompt}"}]},
            r"`role` and `content`: got \['role",
        ),
    ],
)
def test_a_template_that_cannot_work_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as error:
        TeacherPrompt(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        ([{"role": "user", "content": "{prompt}{context}"}], {"prompt": "1"}, r"must be a string"),
        (None, ask("s x"), r"must have a user message .*: got the roles system"),
        (
            None,
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            r"must contain only text",
        ),
    ],
)
def test_a_row_that_the_template_does_not_fit_is_refused(
    template: Any, row: Any, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TeacherPrompt(SHOWN, template).ids(word_tokenizer(), row, "2")


def test_a_template_without_the_completions_place_is_refused() -> None:
    # It does not open the assistant's turn, so that the completion would follow an end token.
    closed = CHAT.replace("a{% endif %}", "{% endif %}").replace(" ; {%", " <eos> {%")
    with pytest.raises(ConfigurationError, match=r"must not end with the end token <eos>"):
        check_row(TeacherPrompt(SHOWN), ROW, word_tokenizer(template=closed), None)


def test_a_token_that_the_teacher_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"of the teacher's embedding: got the token"):
        check_row(TeacherPrompt(SHOWN), ROW, word_tokenizer(), 5)


def rows(*solutions: Any, prompt: str = "1 + 1 =") -> list[dict[str, Any]]:
    return [{"prompt": prompt, "solution": s} for s in solutions]


def checked(prompt: TeacherPrompt, some: list[dict[str, Any]], limit: float = 99) -> str:
    return check_rows(prompt, some, word_tokenizer(), limit)


@pytest.mark.parametrize(
    "context", [SHOWN, JoinedContext({"1": SHOWN}), OtherProblemContext(SHOWN)]
)
@pytest.mark.parametrize("some", [rows("", None), [{"prompt": "1"}]])
def test_a_column_that_no_row_has_is_refused(context: Any, some: list[dict[str, Any]]) -> None:
    with pytest.raises(
        ConfigurationError, match=r"column `solution` must have text .* got none in"
    ):
        checked(TeacherPrompt(context), some)


def test_rows_without_a_context_are_told() -> None:
    assert checked(TeacherPrompt(SHOWN), rows("2", "3")) == ""
    assert "for 1 of 3 checked prompts (1 without" in checked(
        TeacherPrompt(SHOWN), rows("2", "", "3")
    )
    long = checked(TeacherPrompt(SHOWN), rows("2", "2 2 2 2 2"), limit=7)
    assert "for 1 of 2 checked prompts (0 without one, 1 above 7 tokens)" in long


def test_a_limit_that_no_prompt_keeps_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"`max_tokens` .* got 4, below 5 tokens"):
        checked(TeacherPrompt(SHOWN), rows("2", "3 3"), limit=4)


@pytest.mark.parametrize(
    ("context", "prompt"),
    [
        (SHOWN, "1 + 1 = 1 2 1 2 1 2 1 2"),
        (FixedContext("x"), "x 1 + 1 ="),
    ],
)
def test_a_context_that_the_student_sees_is_refused(context: Any, prompt: str) -> None:
    text, chat = rows("1 2 1 2 1 2 1", prompt=prompt), ask(f"u {prompt}")
    for some in (text, [{**chat, "solution": "1  2 1 2 1 2 1"}]):
        with pytest.raises(
            ConfigurationError, match=r"must not be in the student's prompt already"
        ):
            checked(TeacherPrompt(context), some)
    assert checked(TeacherPrompt(SHOWN), [*text, *rows("2 2 2 2 2 2 2")]) == ""  # not in all


def test_an_answer_among_options_is_no_context_that_the_student_sees() -> None:
    assert checked(TeacherPrompt(SHOWN), rows("2", prompt="1 + 1 = ? 1 2 3")) == ""


def test_what_is_sampled_later_is_not_missing() -> None:
    both = JoinedContext({"1": SiblingContext(), "2": FeedbackContext()})
    for context in (SiblingContext(), both):
        assert checked(TeacherPrompt(context), rows("", "")) == ""


def test_template_args_that_the_template_ignores_are_told() -> None:
    with pytest.warns(UserWarning, match=r"does not read enable_thinking"):
        checked(TeacherPrompt(template_args={"enable_thinking": False}), [ROW])
