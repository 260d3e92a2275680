"""Text that a user writes reaches every text setting unchanged."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kdrl_lightning.__main__ import main
from kdrl_lightning.cli.main import KDRLCLI
from kdrl_lightning.cli.settings.text import dump, load
from kdrl_lightning.prompts import PromptSource
from kdrl_lightning.rewards import Sample, TaskReward

HARD = [
    "007",
    "0x10",
    "1e5",
    "1_000",
    "12:30",
    "yes",
    "null",
    "~",
    "true",
    "2026-01-01",
    ".5",
    ".inf",
    "=",
    "<<",
    "`code`",
    "@user",
    "[think]",
    "{a}",
    "{",
    "*x",
    "&x",
    "-",
    "%",
    "x:",
    "!x",
    "'",
    '"',
    "'a'",
    '"a"',
    "é😀",
    "a=b",
    "epoch=1-step=2.ckpt",
    "${x}",
    "\\n",
    "--flag",
    "LocalTeacher",
    "trainer",
    "|",
]
HARD += ["Q: 2+2?", "a: b: c", "Instruction: solve. Format: a number.", "[think] x", "{a: 1}"]
HARD += ["- a", "# x", "a # b", "> a", " a ", "a\nb", "", "\t", "\x85", "| a", "[1, 2]", "a,b"]
TEXTS = st.one_of(st.sampled_from(HARD), st.text(st.characters(codec="utf-8"), max_size=20))


class Keeping(TaskReward):
    """A user's reward that keeps what it is given."""

    def __init__(self, untyped=None, anything: Any = None, **more: Any) -> None:  # type: ignore[no-untyped-def]
        self.given = {"untyped": untyped, "anything": anything, **more}

    def __call__(self, sample: Sample) -> float:
        return 1.0


def config_of(text: str) -> dict[str, Any]:
    """Return a configuration with a text in every place that takes one."""
    row = {"prompt": text, "answer": text, "more": {"deep": [text, {"x": text}]}}
    listed = {"class_path": "test_settings_text.Rows", "init_args": {"rows": [row], "name": text}}
    form = {
        "chat": True,
        "system": text,
        "suffix": text,
        "template_args": {"a": text, "b": [text]},
        "examples": [{"prompt": text, "answer": text}],
    }
    init_args = {"untyped": text, "anything": {"a": [text]}}
    return {
        "model": {"student": f"m{text}", "objective": {"class_path": "GRPO"}},
        "data": {
            "train_prompts": [row],
            "val_prompts": {
                "rows": {"prompts": listed},
                "form": {"prompts": {"class_path": "test_settings_text.Form", "init_args": form}},
            },
            "reward": {
                "class_path": "WeightedRewards",
                "init_args": {
                    "rewards": {
                        "match": {
                            "class_path": "ExactMatch",
                            "init_args": {"marker": text, "answer_column": text},
                        },
                        "own": {
                            "class_path": "test_settings_text.Keeping",
                            "init_args": init_args,
                            "dict_kwargs": {"c": text},
                        },
                    }
                },
            },
        },
        "trainer": {"max_steps": 1, "accelerator": "cpu", "logger": False},
    }


class Rows(PromptSource):
    """Prompts of a user's own class."""

    def __init__(self, rows: Any, name: str) -> None:
        self.rows = rows
        self.name = name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class Form(Rows):
    """Takes what ``PromptForm`` takes."""

    def __init__(
        self,
        chat: bool = False,
        system: str | None = None,
        template_args: dict[str, Any] | None = None,
        examples: Sequence[dict[str, str]] = (),
        suffix: str = "",
    ) -> None:
        super().__init__([{"prompt": "x"}], "")
        self.given = [system, template_args, list(examples), suffix]


def received(cli: KDRLCLI) -> Any:
    """Return what the objects of ``config_of`` were given."""
    data = cli.datamodule
    rows, form = (one.prompts for one in data.evaluation.val)
    match, own = data.rewards.reward.rewards.values()
    return {
        "student": cli.model.student_source,
        "train": list(data.train_prompts),
        "rows": [rows.rows, rows.name],
        "form": form.given,
        "match": [match.marker, match.answer_column],
        "own": own.given,
    }


def expected(text: str) -> Any:
    row = {"prompt": text, "answer": text, "more": {"deep": [text, {"x": text}]}}
    return {
        "student": f"m{text}",
        "train": [row],
        "rows": [[row], text],
        "form": [text, {"a": text, "b": [text]}, [{"prompt": text, "answer": text}], text],
        "match": [text, text],
        "own": {"untyped": text, "anything": {"a": [text]}, "c": text},
    }


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from strings(one)
    else:
        yield value


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


ONE_BY_ONE = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@ONE_BY_ONE
@given(TEXTS)
def test_a_quoted_string_of_a_file_arrives_as_it_is(tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump(config_of(text)), encoding="utf-8", newline="")
    cli = KDRLCLI.run(["--config", str(file)], instantiate_only=True)
    assert received(cli) == expected(text)
    assert {type(one) for one in strings(received(cli))} == {str}


@ONE_BY_ONE
@given(TEXTS)
def test_a_printed_configuration_says_the_same(text: str) -> None:
    printed = io.StringIO()
    with pytest.raises(SystemExit), redirect_stdout(printed):
        KDRLCLI.run([f"--config={dump(config_of(text))}", "--print_config"], instantiate_only=True)
    cli = KDRLCLI.run([f"--config={printed.getvalue()}"], instantiate_only=True)
    assert received(cli) == expected(text)


@ONE_BY_ONE
@given(TEXTS)
@example("{class_path: x}")
def test_a_flag_that_takes_text_takes_any(text: str) -> None:
    given = [
        f"--config={dump(config_of('x'))}",
        "--data.train_prompts=test_settings_text.Form",
        f"--data.train_prompts.suffix={text}",
        "--data.train_prompts.chat=true",
        f"--data.train_prompts.system={text}",
        f"--model.student=m{text}",
    ]
    cli = KDRLCLI.run(given, instantiate_only=True)
    system, _, _, suffix = cli.datamodule.train_prompts.given
    assert suffix == text and cli.model.student_source == f"m{text}"
    assert system == (None if text.strip().lower() in ("null", "~") else text)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("007", 7),
        ('"007"', "007"),
        ("'yes'", "yes"),
        ("a: b: c", "a: b: c"),
        ("# x", "# x"),
        ("&x", "&x"),
        ("`x`", "`x`"),
        ("[think] x", "[think] x"),
        ("{a: '1'}", {"a": "1"}),
        ("2026-01-01", "2026-01-01"),
        ("1e5", 1e5),
        ("null", None),
    ],
)
def test_a_flag_without_a_type_is_yaml_read_once(flag: str, value: Any) -> None:
    given = [f"--config={dump(config_of('x'))}", "--data.reward=test_settings_text.Keeping"]
    cli = KDRLCLI.run([*given, f"--data.reward.untyped={flag}"], instantiate_only=True)
    assert cli.datamodule.rewards.reward.given["untyped"] == value


@ONE_BY_ONE
@given(
    st.recursive(
        TEXTS | st.integers() | st.booleans() | st.none() | st.floats(-1e9, 1e9),
        lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
    )
)
def test_what_is_written_is_read_back(value: Any) -> None:
    assert load(dump(value)) == value


def test_numbers_without_quotes_are_numbers() -> None:
    assert load("[1, 1e5, 0.5, .inf, yes, ~]") == [1, 100000.0, 0.5, float("inf"), True, None]


def test_an_unquoted_number_for_text_is_refused_with_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(dump(config_of("x")).replace("suffix: x", "suffix: 42"))
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(file)])
    assert "suffix` must be text: got 42. Quote it." in capsys.readouterr().err


def test_names_and_numbers_mean_what_they_look_like() -> None:
    text = "{yes: 1, off: 2, null: 3, 1: 4, a: 1:30, b: 010, c: -0x1F, d: 0b11, e: 1_000, f: no}"
    names = {"yes": 1, "off": 2, "null": 3, 1: 4}
    values = {"a": "1:30", "b": 10, "c": -31, "d": 3, "e": 1000, "f": False}
    assert load(text) == names | values
    assert load(dump(load(text))) == load(text)


REWARD = "kdrl_lightning.tiny.addition_reward"


def test_rows_and_sets_are_named_by_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = "[{prompt: p, 1: one, yes: two, answer: 1:30}]"
    sets = f"{{1: {{prompts: {rows}}}, on: {{prompts: {rows}}}}}"
    flags = [f"--data.train_prompts={rows}", f"--data.val_prompts={sets}"]
    flags += ["--model.student=x", "--model.objective=GRPO", f"--data.reward={REWARD}"]
    data = KDRLCLI.run([*flags, "--trainer.logger=false"], instantiate_only=True).datamodule
    assert data.train_prompts == [{"prompt": "p", "1": "one", "yes": "two", "answer": "1:30"}]
    assert [one.name for one in data.evaluation.val] == ["1", "on"]


@pytest.mark.parametrize("word", ["NO", "yes", "On", "off"])
def test_yes_and_no_are_answers_in_a_row_and_switches_elsewhere(word: str) -> None:
    rows = load(f"[{{prompt: q, answer: {word}, kept: true}}, {{question: q, answer: {word}}}]")
    switch = word.lower() in ("yes", "on")
    assert rows == [
        {"prompt": "q", "answer": word, "kept": True},
        {"question": "q", "answer": switch},
    ]
    assert load(f"trainer: {{logger: {word}}}") == {"trainer": {"logger": switch}}
    assert load(dump(rows)) == rows
