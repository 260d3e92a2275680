"""Prompts in any form become the ids that the model should see, or one error line."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from helpers.word_tokenizer import CHAT, word_tokenizer
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.prompts import encode_prompt
from kdrl_lightning.prompts.messages import PromptForm

BOS, EOS = 0, 1
ONE_PLUS = [3, 6]  # 1 +


def ask(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def answer(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


#                  <bos>  u   1   +   ;  a
ASKED: list[int] = [BOS, 9, 3, 6, 8, 10]


def refused(tokenizer: Any, row: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        encode_prompt(tokenizer, row)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("around", "text", "ids"),
    [
        ("$A", "1 +", ONE_PLUS),
        ("<bos> $A", "1 +", [BOS, *ONE_PLUS]),
        ("<bos> $A", "<bos> 1 +", [BOS, *ONE_PLUS]),
        ("<bos> $A", "<bos>", [BOS]),
        ("<bos> x $A", "1 +", [BOS, 14, *ONE_PLUS]),
        ("<bos> x $A", "<bos> x 1 +", [BOS, 14, *ONE_PLUS]),
        ("$A <eos>", "1 +", ONE_PLUS),
        ("<bos> $A <eos>", "1 +", [BOS, *ONE_PLUS]),
        ("<bos> $A <eos>", "<bos> u 1 + ; a", ASKED),
        ("$A <eos>", "1 <eos> +", [3, EOS, 6]),  # examples may be parted by it
    ],
)
def test_a_text_has_one_bos_and_no_end(around: str, text: str, ids: list[int]) -> None:
    assert encode_prompt(word_tokenizer(around), {"prompt": text}) == ids


@pytest.mark.parametrize("around", ["$A", "<bos> $A", "$A <eos>", "<bos> $A <eos>"])
def test_a_rendered_chat_has_the_templates_bos_alone(around: str) -> None:
    tokenizer = word_tokenizer(around)
    assert encode_prompt(tokenizer, {"prompt": [ask("1 +")]}) == ASKED
    # The same conversation, rendered by somebody else before.
    text = tokenizer.apply_chat_template([ask("1 +")], tokenize=False, add_generation_prompt=True)
    assert encode_prompt(tokenizer, {"prompt": text}) == ASKED


class Stubborn:
    """Adds its special tokens, whatever it is asked for."""

    def __init__(self, tokenizer: Any) -> None:
        self.inner = tokenizer
        self.eos_token = tokenizer.eos_token
        self.bos_token_id, self.eos_token_id = BOS, EOS
        self.chat_template = CHAT

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return self.inner(text)

    def apply_chat_template(self, turns: Any, tokenize: bool = True, **options: Any) -> Any:
        text = self.inner.apply_chat_template(turns, **{**options, "return_dict": False})
        return self.inner(text) if tokenize else text

    def decode(self, ids: Any) -> str:
        return str(self.inner.decode(ids))


def test_a_tokenizer_that_always_adds_tokens_is_set_right() -> None:
    tokenizer = word_tokenizer("<bos> $A <eos>")
    apply = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda turns, **options: apply(
        turns, **{**options, "tokenize": False}
    )
    stubborn = Stubborn(tokenizer)
    assert encode_prompt(stubborn, {"prompt": "1 +"}) == [BOS, *ONE_PLUS]
    assert encode_prompt(stubborn, {"prompt": "<bos> 1 +"}) == [BOS, *ONE_PLUS]
    assert encode_prompt(stubborn, {"prompt": [ask("1 +")]}) == ASKED


@pytest.mark.parametrize("text", ["1 + <eos>", "1 + <eos> \n", "<bos> u 1 ; a 2 <eos>"])
def test_a_text_that_ends_with_the_end_token_is_refused(text: str) -> None:
    words = (
        rf"^a prompt must not end with the end token <eos>: got {re.escape(repr(text))}\. Remove"
    )
    refused(word_tokenizer(), {"prompt": text}, words)


def test_a_template_that_does_not_open_the_answer_is_refused_if_it_ends_the_turn() -> None:
    row = {"prompt": [ask("1 +")]}
    silent = "{% for m in messages %}u {{ m['content'] }} <eos>{% endfor %}"
    refused(word_tokenizer(template=silent), row, r"end token <eos>: got \[.*\]\. Use a chat temp")
    # Llama 2 and Mistral open nothing either, and are right: no end token stands there.
    inst = "{{ bos_token }}{% for m in messages %}u {{ m['content'] }} ; {% endfor %}"
    assert encode_prompt(word_tokenizer(template=inst), row) == ASKED[:-1]


@pytest.mark.parametrize(
    "messages",
    [
        [{**ask("1 +"), "tool_calls": None, "name": None}],
        np.array([ask("1 +")]),
        np.array([{"role": np.str_("user"), "content": np.str_("1 +"), "tool_calls": None}]),
        (ask("1 +"),),
        [ask([{"type": "text", "text": "1 "}, {"type": "text", "text": "+", "image_url": None}])],
        [ask(np.array([{"type": "text", "text": "1 +"}]))],
        [ask(["1 ", "+"])],
    ],
    ids=["none keys", "array", "array of numpy", "tuple", "parts", "array of parts", "texts"],
)
def test_messages_of_parquet_and_friends(messages: Any) -> None:
    strict = CHAT.replace("{% for m in messages %}", "{% for m in messages %}" + CALLS)
    assert encode_prompt(word_tokenizer(template=strict), {"prompt": messages}) == ASKED


CALLS = (
    "{% if 'tool_calls' in m %}{% for c in m['tool_calls'] %}{{ c }}{% endfor %}{% endif %}"
    "{% if 'name' in m %}x {% endif %}"
)


def test_messages_stay_as_they_are() -> None:
    parts = [{"type": "text", "text": "1 +", "image": None}]
    row = {"prompt": [{**ask(parts), "tool_calls": None}]}
    encode_prompt(word_tokenizer(), row)
    assert row == {"prompt": [{**ask(parts), "tool_calls": None}]}


def test_a_call_needs_no_words_and_its_arguments_lose_what_parquet_filled_in() -> None:
    template = "{% for m in messages %}{% for c in m.tool_calls or [] %}" + (
        "{% for k, v in c.function.arguments.items() %}x {{ v }} {% endfor %}{% endfor %}"
        "{{ m.content or '' }} ; {% endfor %}"
    )
    call = {"function": {"name": "add", "arguments": {"a": "1", "b": None}}}
    messages = [ask("2"), {**answer(None), "tool_calls": [call]}, {"role": "tool", "content": "3"}]
    ids = encode_prompt(word_tokenizer(template=template), {"prompt": messages})
    assert ids == [4, 8, 14, 3, 8, 5, 8]  # 2 ; x 1 ; 3 ;


BAD: dict[str, tuple[Any, str]] = {
    "an answer": ([ask("1 +"), answer("2")], r"must not end with an assistant message.* 1\."),
    "an image": (
        [ask([{"type": "image"}])],
        r"contain only text: got a part of type image in message 0",
    ),
    "a link": (
        [ask([{"type": "text", "text": "1"}, {"type": "image_url", "image_url": {"url": "u"}}])],
        "got a part of type image_url in message 0",
    ),
    "a role": ([{"role": "human", "content": "1"}], r"names: got human in message 0\. Rename"),
    "no content": ([{"role": "user"}], r"must be text: got none in message 0 \(user\)"),
    "a number": ([ask(5)], r"content of a message must be text: got int 5 in message 0"),
    "missing": ([ask(float("nan"))], r"must be text: got float nan in message 0"),
    "nothing asked": (
        [ask(" \n")],
        r"last user message must have text: got ' \\n'\.",
    ),
    "no message": ([], r"must have at least one message: got \[\]"),
    "ShareGPT": ([{"from": "human", "value": "1"}], r"ValueError: message 0 has no role"),
    "json": (json.dumps([ask("1 +")]), r"got messages as a string, '\[\{.*JSON Lines"),
    "repr": (str([ask("1 +")]), "got messages as a string"),
    "json of one": (json.dumps(ask("1 +")), "got messages as a string"),
    "json of a row": (json.dumps({"messages": [ask("1 +")]}), "got messages as a string"),
    "nan": (float("nan"), r"must be a string or a list of chat messages: got nan\."),
    "an empty cell": ("", r"must have at least one token: got ''"),
    "white space": (" \n", r"must have at least one token: got ' \\n'"),
}


@pytest.mark.parametrize(("prompt", "words"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("around", ["$A", "<bos> $A <eos>"])
def test_what_is_no_prompt_is_refused(prompt: Any, words: str, around: str) -> None:
    refused(word_tokenizer(around), {"prompt": prompt}, words)


def test_white_space_that_has_tokens_is_refused() -> None:
    class Bytes:
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": list(text.encode())}

    refused(
        Bytes(), {"prompt": " \n"}, r"must be more than white space: got ' \\n'\. Remove the row\.$"
    )


def test_a_role_that_the_template_names_is_taken() -> None:
    template = "{% for m in messages %}{{ 'x' if m.role == 'critic' else 'u' }} {% endfor %}a"
    row = {"prompt": [{"role": "critic", "content": "1"}]}
    assert encode_prompt(word_tokenizer(template=template), row) == [14, 10]


def test_what_the_template_refuses_is_one_line() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no\nsystem') }}{% endif %}"
    row = {"prompt": [{"role": "system", "content": "s"}, ask("1")]}
    refused(
        word_tokenizer(template=template), row, r"accepts: got \[.*\(TemplateError: no system\)"
    )


@pytest.mark.parametrize(
    "more",
    [
        {"continue_final_message": True},
        {"continue_final_message": np.bool_(True)},
        {"template_args": {"continue_final_message": True, "other": None}},
    ],
)
@pytest.mark.parametrize("around", ["$A", "<bos> $A <eos>"])
def test_a_begun_answer_is_continued_by_wish(more: dict[str, Any], around: str) -> None:
    row = {"prompt": [ask("1 +"), answer("2 =")], **more}
    assert encode_prompt(word_tokenizer(around), row) == [*ASKED, 4, 7]


def test_there_must_be_one_answer_to_continue() -> None:
    wish = {"continue_final_message": True}
    words = r"with `continue_final_message` must end with an assistant message: got user"
    refused(word_tokenizer(), {"prompt": [ask("1 +")], **wish}, words)
    two = [ask("1 +"), answer("3"), answer("2 =")]
    refused(word_tokenizer(), {"prompt": two, **wish}, r"show the model its answer: got one in mes")
    words = "`continue_final_message` must be true or false: got the text 'false'. Convert it."
    for text in ({"continue_final_message": "false"}, {"template_args": {**wish, **{
        "continue_final_message": "false"}}}):  # fmt: skip
        refused(word_tokenizer(), {"prompt": [ask("1 +"), answer("2 =")], **text}, words)
    for no in (False, None, float("nan")):
        row = {"prompt": [ask("1 +")], "continue_final_message": no}
        assert encode_prompt(word_tokenizer(), row) == ASKED


def test_a_prefill_begins_every_answer() -> None:
    form = PromptForm(chat=True, prefill="2 =")
    row = form.row({"answer": "3"}, "1 +")
    assert row["continue_final_message"] is True and row["answer"] == "3"
    assert encode_prompt(word_tokenizer(), row) == [*ASKED, 4, 7]
    with pytest.raises(ConfigurationError, match="`prefill` must go with `chat: true`: got '2'"):
        PromptForm(prefill="2")
    # It does not hide an answer that the data set's conversation ends with.
    answered = form.row({}, [ask("1 +"), answer("3")])
    refused(word_tokenizer(), answered, "would show the model its answer")


@pytest.mark.parametrize("tools", [[{"name": "add"}], '[{"name": "add"}]', np.array([{"a": None}])])
def test_tools_reach_the_template(tools: Any) -> None:
    row = {"prompt": [ask("1 +")], "tools": tools}
    assert encode_prompt(word_tokenizer(), row) == [BOS, 13, 3, *ASKED[1:]]  # T 1


@pytest.mark.parametrize("tools", [None, [], "", float("nan"), np.array([])])
def test_no_tools_change_nothing(tools: Any) -> None:
    row = {"prompt": [ask("1 +")], "tools": tools}
    assert encode_prompt(word_tokenizer(), row) == ASKED


@pytest.mark.parametrize(
    ("tools", "template", "words"),
    [
        (
            "add, multiply",
            CHAT,
            r"`tools` must be a list, or a list in JSON: got 'add, mult.*\(Exp",
        ),
        ('{"name": "add"}', CHAT, r"`tools` must be a list, or a list in JSON: got \{'name'"),
        (
            [{"name": "add"}],
            "{{ messages }}",
            "chat template must accept `tools`.* Rename the column",
        ),
    ],
)
def test_tools_that_the_model_would_not_see_are_refused(
    tools: Any, template: str, words: str
) -> None:
    refused(word_tokenizer(template=template), {"prompt": [ask("1 +")], "tools": tools}, words)


def test_the_suffix_stands_after_a_question_of_messages_too() -> None:
    form = PromptForm(chat=True, suffix=" =")
    assert form([ask("1 +")]) == [ask("1 + =")]
    assert PromptForm(suffix=" =")([ask("1 +")]) == [ask("1 + =")]
    assert form(np.array([ask("1 +")])) == [ask("1 + =")]
    assert form([ask("1 +"), answer("2")]) == [ask("1 +"), answer("2")]


def test_a_form_does_not_hide_an_empty_question() -> None:
    for form in (
        PromptForm(suffix=" ="),
        PromptForm(examples=[{"prompt": "1 +", "answer": "2"}]),
        PromptForm(chat=True, suffix=" ="),
        PromptForm(chat=True, prefill="2"),
    ):
        refused(word_tokenizer(), form.row({}, ""), "a prompt must have at least one token: got ''")
        stored = json.dumps([ask("1 +")])
        refused(word_tokenizer(), form.row({}, stored), "got messages as a string")
    begun = PromptForm(chat=True, prefill="2").row({}, [ask("")])
    refused(word_tokenizer(), begun, "last user message must have text: got ''")
