"""Settings by the names of 0.1: files, layers, groups and flags mean the same as those of today."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import kdrl_lightning
from helpers.program import made
from kdrl_lightning import RolloutDataModule, RolloutEngine, TransformersEngine
from kdrl_lightning.__main__ import main
from kdrl_lightning.cli.evaluate import make_parser, pruned
from kdrl_lightning.cli.settings.renamed import RENAMED, renamed, renamed_flags
from kdrl_lightning.errors import ConfigurationError

pytestmark = pytest.mark.usefixtures("empty_folder")
REST: dict[str, Any] = {
    "model": {"student": "nowhere", "objective": "GRPO"},
    "trainer": {"accelerator": "cpu", "logger": False},
}
ROWS = {
    "train_prompts": {"class_path": "kdrl_lightning.tiny.ColumnAddition", "init_args": {"size": 8}},
    "reward": "kdrl_lightning.tiny.addition_reward",
}
# A value that is not the default for each of them.
OLD: dict[str, Any] = {
    "prompts_per_rollout": 4,
    "group_size": 3,
    "max_refills": 2,
    "max_tokens": 7,
    "temperature": 0.5,
    "minibatches_per_rollout": 2,
    "epochs_per_rollout": 3,
    "max_off_policy_steps": 0,
    "rollouts_per_epoch": 5,
    "mask_truncated": True,
    "max_tokens_per_micro_batch": 900,
    "teacher_completions": 2,
    "teacher_temperature": 0.7,
    "teacher_engine": {"class_path": "TransformersEngine", "init_args": {"max_sequences": 9}},
    "val_batch_size": 11,
    "val_samples": 4,
    "val_temperature": 0.9,
    "val_k": [2, 4],
    "max_reward_failure_frac": 0.25,
    "failed_reward": -1.0,
}
NEW = {
    "rollout": {name: OLD[name] for name in list(OLD)[:11]},
    "teacher_completions": {"count": 2, "temperature": 0.7, "engine": OLD["teacher_engine"]},
    "evaluation": {"batch_size": 11, "samples": 4, "temperature": 0.9, "k": [2, 4]},
    "reward_failures": {"max_frac": 0.25, "reward": -1.0},
}


def write(name: str, data: dict[str, Any], **more: Any) -> str:
    Path(name).write_text(yaml.safe_dump({**REST, "data": {**ROWS, **data}, **more}))
    return f"--config={name}"


def settings(cli: Any) -> Any:
    return cli.config.data.as_dict()


def test_the_table_has_every_setting_of_0_1_that_moved() -> None:
    assert {f"data.{name}" for name in OLD} == set(RENAMED)
    for new in RENAMED.values():
        _, group, inner = new.split(".")
        assert inner in NEW[group]


def test_flat_settings_equal_those_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    flat, nested = made(write("flat.yaml", OLD)), made(write("nested.yaml", NEW))
    assert settings(flat) == settings(nested)
    assert flat.datamodule.rollout == nested.datamodule.rollout
    assert flat.datamodule.rollout.max_tokens_per_micro_batch == 900
    engine: RolloutEngine = flat.datamodule.collector.teacher.engine
    assert isinstance(engine, TransformersEngine)
    notes = [x for x in capsys.readouterr().out.splitlines() if "old names" in x]
    assert len(notes) == 1 and notes[0].startswith("note: ")
    assert "`data.val_k` is now `data.evaluation.k`" in notes[0]


def test_flat_flags_equal_those_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    base = write("rest.yaml", {})
    flags = [f"--data.{name}={yaml.safe_dump(value).strip()}" for name, value in OLD.items()]
    flags = [f for f in flags if not f.startswith(("--data.teacher_engine", "--data.val_k"))]
    engine = ["--data.teacher_engine=TransformersEngine", "--data.teacher_engine.max_sequences=9"]
    flat = made(base, *[f.removesuffix("\n...") for f in flags], *engine, "--data.val_k", "[2, 4]")
    assert settings(flat) == settings(made(write("nested.yaml", NEW)))
    assert "`data.teacher_engine.max_sequences` is now" in capsys.readouterr().out


def test_layers_of_both_spellings_lie_over_each_other() -> None:
    write("base.yaml", {"group_size": 3, "max_tokens": 7, "teacher_completions": 2})
    Path("over.yaml").write_text(
        "base: base.yaml\ndata: {rollout: {group_size: 4}, teacher_completions: {count: 1}}\n"
    )
    over = made("--config=over.yaml").datamodule
    assert (over.rollout.group_size, over.rollout.max_tokens) == (4, 7)
    assert over.collector.teacher.count == 1
    write("base.yaml", {"rollout": {"group_size": 3, "max_tokens": 7}})
    Path("over.yaml").write_text("base: base.yaml\ndata.group_size: 4\n")
    assert made("--config=over.yaml").datamodule.rollout.group_size == 4
    Path("second.yaml").write_text("data: {max_tokens: 9}\n")
    both = made("--config=over.yaml", "--config=second.yaml", "--data.group_size", "5").datamodule
    assert (both.rollout.group_size, both.rollout.max_tokens) == (5, 9)


@pytest.mark.parametrize("way", ["flag", "text", "key"])
def test_a_file_of_the_group_is_translated(way: str) -> None:
    Path("data.yaml").write_text(yaml.safe_dump({**ROWS, "group_size": 3, "val_samples": 2}))
    Path("rest.yaml").write_text(yaml.safe_dump(REST))
    flags = ["--config=rest.yaml", "--data=data.yaml"]
    if way == "text":
        flags[1] = f"--data={yaml.safe_dump({**ROWS, 'group_size': 3}, default_flow_style=True)}"
    elif way == "key":
        Path("whole.yaml").write_text("base: rest.yaml\ndata: data.yaml\n")
        flags = ["--config=whole.yaml"]
    assert made(*flags).datamodule.rollout.group_size == 3


def test_a_saved_configuration_runs_again(capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    write("printed.yaml", OLD)
    for _ in range(2):
        with pytest.raises(SystemExit):
            main(["fit", "--config=printed.yaml", "--print_config"])
        printed.append(capsys.readouterr().out)
        Path("printed.yaml").write_text(printed[-1])
    assert printed[0] == printed[1]
    assert {*OLD} & {*yaml.safe_load(printed[0])["data"]} == {"teacher_completions"}
    under_fit = {"fit": {"data": OLD}}
    assert renamed(under_fit, "x") == {"fit": {"data": NEW}}


def test_an_evaluation_reads_them_too() -> None:
    write("flat.yaml", OLD)
    parser = make_parser()
    config = parser.parse_args(pruned(["--config=flat.yaml", "--data.val_batch_size=5"]))
    assert (config.data.rollout.max_tokens, config.data.evaluation.batch_size) == (7, 5)


@pytest.mark.parametrize(
    ("data", "flags", "words"),
    [
        (
            {"group_size": 3, "rollout": {"group_size": 4}},
            [],
            "`data.rollout.group_size` must occur once in over.yaml: got it by its old name "
            "`data.group_size`, too. Remove that.",
        ),
        (
            {},
            ["--data.group_size=3", "--data.rollout.group_size=4"],
            "`--data.rollout.group_size` must occur once in the command line: got it by its old "
            "name `--data.group_size`, too. Remove that.",
        ),
        ({"group_size": "many"}, [], "`data.group_size` must be a whole number: got many."),
        ({}, ["--data.val_samples=x"], "`data.val_samples` must be a whole number: got x."),
        ({"group_sise": 3}, [], "did you mean group_size?"),
        ({"max_tokens": 0}, [], "`max_tokens` must be at least 1: got 0."),
        ({"rollout": None}, [], "`data.rollout`"),
        ({"teacher_completions": "two"}, [], "`data.teacher_completions`"),
    ],
)
def test_a_mistake_is_named_as_it_was_written(
    data: dict[str, Any], flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", write("over.yaml", data), *flags])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line


@pytest.mark.parametrize(
    "given",
    [
        {"data.group_size": 3, "data.rollout.group_size": 4},
        {"data.group_size": 3, "data": {"rollout": {"group_size": 4}}},
        {"data": {"group_size": 3, "rollout.group_size": 4}},
        {"data": {"group_size": 3, "rollout": "rollout.yaml"}},
    ],
)
def test_both_names_are_refused_however_they_are_written(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"by its old name `data\.group_size`, too"):
        renamed(given, "x.yaml")


def test_other_words_stay_as_they_are() -> None:
    words = ["fit", "--data.seed=1", "data.group_size", "--trainer.max_steps", "3"]
    assert renamed_flags(words) == words
    assert renamed({"model": {"temperature": 1}, 3: "x"}, "x") == {
        "model": {"temperature": 1},
        3: "x",
    }


def test_flat_arguments_of_python_are_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'group_size'"):
        RolloutDataModule([], lambda s: 0.0, group_size=3)  # type: ignore[call-arg]


FORMER = {"beside": "supports_async", "fixed": "has_own_weights"}


@pytest.mark.parametrize(("old", "new"), FORMER.items())
def test_an_engine_may_use_the_former_names(old: str, new: str) -> None:
    with pytest.warns(FutureWarning, match=rf"^`Mine.{old}` must be called `{new}`"):
        engine = type("Mine", (TransformersEngine,), {old: True})
    assert getattr(engine, new) is True


@pytest.mark.parametrize("name", ["HFPrompts", "kdrl_lightning.prompts.HFPrompts"])
@pytest.mark.parametrize(("streaming", "kind"), [(True, "StreamedHFPrompts"), (False, "HFPrompts")])
def test_a_class_that_was_split_is_found_by_its_former_argument(
    name: str, streaming: bool, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rows.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "2+2="}\n')
    spec = {
        "class_path": name,
        "init_args": {"path": "rows.jsonl", "take": 1, "streaming": streaming},
    }
    mixed = {"class_path": "MixedPrompts", "init_args": {"sources": {"a": spec}}}
    data = made(write("x.yaml", {"train_prompts": mixed, "val_prompts": spec})).datamodule
    for source in (data.train_prompts.sources["a"], data.val_prompts):
        assert type(source).__name__ == kind and len(source) == 1
    assert capsys.readouterr().out.count("is now StreamedHFPrompts") == streaming


def test_a_class_that_is_gone_names_what_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    cure = r"is gone: write GRPO with `distill: SurrogateTerm`"
    with pytest.raises(AttributeError, match=cure):
        _ = kdrl_lightning.WeightedSum
    for name in (
        "WeightedSum",
        "kdrl_lightning.WeightedSum",
        "kdrl_lightning.objectives.WeightedSum",
    ):
        with pytest.raises(SystemExit) as caught:
            main(["fit", "--config", "rlad", f"--model.objective={name}"])
        (line,) = capsys.readouterr().err.splitlines()
        assert caught.value.code == 2 and re.search(cure, line), line
