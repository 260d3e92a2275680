"""Prompt rows from files, and how they become token ids."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path
from typing import Any

import pytest

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.prompts import JSONLPrompts, encode_prompt
from kdrl_lightning.prompts.base import encode_all
from kdrl_lightning.tiny.models import make_tokenizer

# In symbols that the tokenizer knows: # is the user, + the system, = the answer to come.
TEMPLATE = (
    "{% for m in messages %}{{ {'user': '#', 'system': '+'}[m['role']] + m['content'] + ',' }}"
    "{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


def write(folder: Path, *lines: str) -> str:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return write(tmp_path, '{"prompt": "1+1=", "answer": 2}', '{"prompt": "2+2=", "answer": 4}')


def test_rows_keep_all_columns_and_their_order(file):
    rows = JSONLPrompts(file)
    assert len(rows) == 2
    assert [rows[i] for i in range(2)] == [
        {"prompt": "1+1=", "answer": 2},
        {"prompt": "2+2=", "answer": 4},
    ]


def test_a_row_behind_the_last_is_an_index_error(file):
    with pytest.raises(IndexError):
        JSONLPrompts(file)[2]


def test_another_column_becomes_the_prompt(tmp_path):
    rows = JSONLPrompts(write(tmp_path, '{"question": "why?", "id": 3}'), prompt_column="question")
    assert rows[0] == {"question": "why?", "id": 3, "prompt": "why?"}


def test_chat_wraps_the_question(file):
    assert JSONLPrompts(file, chat=True)[0]["prompt"] == [{"role": "user", "content": "1+1="}]


def test_a_system_message_goes_in_front(file):
    assert JSONLPrompts(file, chat=True, system="Be brief.")[0]["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1="},
    ]


def test_messages_in_the_file_stay_as_they_are(tmp_path):
    messages = [{"role": "user", "content": "hello"}]
    path = write(tmp_path, json.dumps({"prompt": messages}))
    assert JSONLPrompts(path, chat=True)[0]["prompt"] == messages


def test_reading_a_row_leaves_the_source_alone(file):
    rows = JSONLPrompts(file)
    rows[0]["prompt"] = "changed"
    assert rows[0]["prompt"] == "1+1="


def test_blank_lines_and_windows_line_ends_are_no_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\r\n{"prompt": "a"}\r\n   \r\n{"prompt": "b"}\r\n')
    assert [row["prompt"] for row in JSONLPrompts(str(path)).rows] == ["a", "b"]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_only_line_feeds_end_a_row(tmp_path, separator):
    # JSON allows these unescaped inside a string, and ensure_ascii=False writes them so.
    text = f"one{separator}two"
    path = write(tmp_path, json.dumps({"prompt": text}, ensure_ascii=False))
    assert JSONLPrompts(path)[0]["prompt"] == text


def test_text_beyond_ascii_is_read(tmp_path):
    path = write(tmp_path, json.dumps({"prompt": "Größe √2 你好"}, ensure_ascii=False))
    assert JSONLPrompts(path)[0]["prompt"] == "Größe √2 你好"


def refused(words: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        JSONLPrompts(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_system_without_chat_is_refused(file):
    refused(
        r"^`system` must go with `chat: true`: got 'Be brief\.'\. Set", file, system="Be brief."
    )


def test_a_missing_file_is_refused(tmp_path):
    path = str(tmp_path / "none.jsonl")
    refused(rf"^`path` must be a JSON Lines file: got {path}, which is not a file\. Check", path)


def test_a_folder_is_refused(tmp_path):
    refused("must be a JSON Lines file", str(tmp_path))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "\xff"}')
    refused(
        rf"^`path` must be readable UTF-8: got {path} \('utf-8' codec .*\)\. Convert the file\.$",
        str(path),
    )


def test_a_line_that_is_not_json_is_named(tmp_path):
    path = write(tmp_path, '{"prompt": "a"}', "", "{prompt: b}")
    refused(rf"^{path}:3 must be JSON: got Expecting property name .*\. Fix the line\.$", path)


def test_a_row_without_the_column_is_named(tmp_path):
    path = write(tmp_path, '{"prompt": "a"}', '{"question": "b", "answer": 1}')
    refused(
        rf"^{path}:2 must have the column `prompt`: got \['answer', 'question'\]\. "
        r"Name yours with `prompt_column`\.$",
        path,
    )


def test_a_line_that_is_no_object_is_named(tmp_path):
    path = write(tmp_path, '["prompt"]')
    refused(rf"^{path}:1 must have the column `prompt`: got list\.", path)


@pytest.mark.parametrize("text", ["", "\n\n  \n"])
def test_a_file_without_rows_is_refused(tmp_path, text):
    path = write(tmp_path, text)
    refused(
        rf"^`path` must have at least one row: got {path}, which is empty\. Name another file\.$",
        path,
    )


def test_text_is_encoded_token_by_token():
    assert encode_prompt(make_tokenizer(), {"prompt": "12+3="}) == [3, 4, 12, 5, 13]


def test_messages_are_rendered_with_the_template_and_a_generation_prompt():
    class Tokenizer:
        chat_template = "any"

        def __call__(self, text, **options):
            return {"input_ids": [1] * len(text)}

        def apply_chat_template(self, messages, **options):
            assert options["add_generation_prompt"]
            if not options["tokenize"]:  # the text, which must hold every message
                return "".join(m["content"] for m in messages)
            assert options["return_dict"]
            return {"input_ids": [len(m["content"]) for m in messages]}

    row = {"prompt": [{"role": "system", "content": "abc"}, {"role": "user", "content": "de"}]}
    assert encode_prompt(Tokenizer(), row) == [3, 2]


def test_messages_are_rendered_by_a_real_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "system", "content": "0"}, {"role": "user", "content": "1+2"}]
    #      +   0   ,   #  1   +  2   ,   =
    ids = [12, 2, 14, 15, 3, 12, 4, 14, 13]
    assert encode_prompt(tokenizer, {"prompt": messages}) == ids
    assert encode_prompt(tokenizer, {"prompt": tuple(messages)}) == ids


@pytest.mark.parametrize("messages", [[{"role": "tool", "content": "1"}], [{"content": 1}], [5]])
def test_messages_that_the_template_does_not_take_are_refused(messages):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    words = r"^a prompt must be messages that the chat template accepts: got \[.*\]? \(\w+Error: "
    with pytest.raises(ConfigurationError, match=words):
        encode_prompt(tokenizer, {"prompt": messages})


def test_ids_are_a_plain_list():
    ids = encode_prompt(make_tokenizer(), {"prompt": "1"})
    assert type(ids) is list and type(ids[0]) is int


def test_a_row_without_prompt_is_refused():
    words = r"^a prompt row must have the column `prompt`: got \['answer', 'q'\]\. Rename the col"
    with pytest.raises(ConfigurationError, match=words):
        encode_prompt(make_tokenizer(), {"q": "1", "answer": "2"})


def test_messages_without_template_are_refused():
    words = (
        r"^a prompt of messages must have a tokenizer with a chat template: got none\. Use plain"
    )
    with pytest.raises(ConfigurationError, match=words):
        encode_prompt(make_tokenizer(), {"prompt": [{"role": "user", "content": "1"}]})


# The tokenizer has no unknown token: what it does not know leaves nothing.
@pytest.mark.parametrize("prompt", ["", "why?"])
def test_an_empty_prompt_is_refused(prompt):
    got = re.escape(repr(prompt))
    words = rf"^a prompt must have at least one token: got {got}\. Remove the row\.$"
    with pytest.raises(ConfigurationError, match=words):
        encode_prompt(make_tokenizer(), {"prompt": prompt})


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("prompt", [5, 0, 1.5, None, True, b"1", {"role": "user", "content": "1"}])
def test_a_prompt_that_is_neither_text_nor_messages_is_refused(prompt, template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ConfigurationError) as caught:
        encode_prompt(tokenizer, {"prompt": prompt})
    assert str(caught.value) == (
        f"a prompt must be a string or a list of chat messages: got {prompt!r}. "
        "Convert it, or remove the row."
    )


@pytest.mark.parametrize("chat", [False, True])
def test_a_number_in_the_file_is_no_prompt(tmp_path, chat):
    source = JSONLPrompts(write(tmp_path, '{"prompt": 5}'), chat=chat)
    with pytest.raises(ConfigurationError, match=r"a list of chat messages: got 5\. Convert it"):
        encode_all(source, "prompts", make_tokenizer())


def test_a_whole_source_is_encoded_in_order(file):
    expected = [
        ({"prompt": "1+1=", "answer": 2}, [3, 12, 3, 13]),
        ({"prompt": "2+2=", "answer": 4}, [4, 12, 4, 13]),
    ]
    source = JSONLPrompts(file)
    assert encode_all(source, "prompts", make_tokenizer()) == expected
    assert encode_all([row for row, _ in expected], "prompts", make_tokenizer()) == expected


def test_a_source_without_rows_is_refused_by_its_name():
    with pytest.raises(
        ConfigurationError,
        match=r"^`val_prompts` must have at least one row: got none\. Add rows\.$",
    ):
        encode_all([], "val_prompts", make_tokenizer())


def test_the_mark_of_windows_is_no_part_of_the_first_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}')
    assert [row["prompt"] for row in JSONLPrompts(str(path)).rows] == ["a", "b"]


def test_rows_are_read_when_they_are_asked_for(tmp_path):
    lines = [json.dumps({"prompt": f"{'é' * (i % 5)}{i}", "answer": i}) for i in range(50)]
    rows = JSONLPrompts(write(tmp_path, *lines))
    for i in (49, 0, 17, 3, -1):
        assert rows[i] == json.loads(lines[i])
    assert rows.rows[2:4] == [json.loads(line) for line in lines[2:4]]
    # What is in memory is where the lines begin.
    assert sum(isinstance(value, dict) for value in gc.get_referents(rows.rows.__dict__)) == 0


def test_a_file_that_changes_under_a_run_is_refused(tmp_path):
    path = write(tmp_path, '{"prompt": "a"}', '{"prompt": "b"}')
    rows = JSONLPrompts(path)
    write(tmp_path, '{"prompt": "a longer one"}', '{"prompt": "b"}')
    words = rf"^`path` must not change during a run: got {path}, which has changed\. Start"
    with pytest.raises(ConfigurationError, match=words):
        rows[1]
