"""A file over its ``base`` equals two files on the command line; dropped settings are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.program import CONFIG, made
from kdrl_lightning.cli.main import KDRLCLI
from kdrl_lightning.cli.settings.layers.merging import merge
from kdrl_lightning.cli.settings.unused import take_notes

pytestmark = pytest.mark.usefixtures("empty_folder")
ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-4, "weight_decay": 0.5}}
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}
ROWS = [{"prompt": "1"}, {"prompt": "2"}]
ADDITION = {"class_path": "kdrl_lightning.tiny.ColumnAddition", "init_args": {"size": 32}}
WEIGHTED = {
    "class_path": "WeightedRewards",
    "init_args": {"rewards": {"a": "ExactMatch", "b": "ExactMatch"}, "weights": {"a": 2.0}},
}
SCHEDULE = "torch.optim.lr_scheduler.LinearLR"
SETS = {"a": {"prompts": ROWS}, "b": {"prompts": ROWS}}
CALLBACKS = [{"class_path": "CPUThreads", "init_args": {"threads": 1}}, "StepProfile"]


def notes_of(base: Any, over: Any, name: str = "a.b") -> list[str]:
    """Return the notes of a merge of two values of a setting."""
    merge(base, over, name)
    return take_notes()


# Setting, its class in the base, arguments in the file over it.
ARGUMENTS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "optimizer": ("model.optimizer", ADAMW, {"lr": 0.1}),
    "a class by its name": ("model.optimizer", "torch.optim.SGD", {"lr": 0.1}),
    "scheduler": (
        "model.lr_scheduler",
        {"class_path": SCHEDULE, "init_args": {"start_factor": 0.7, "total_iters": 9}},
        {"total_iters": 3},
    ),
    "objective": (
        "model.objective",
        {"class_path": "GRPO", "init_args": {"clip_low": 0.1, "clip_high": 0.3}},
        {"clip_low": 0.2},
    ),
    "teacher": (
        "model.teacher",
        {"class_path": "LocalTeacher", "init_args": {"model": "a/b", "dtype": "bfloat16"}},
        {"model": "c/d"},
    ),
    "student": (
        "model.student",
        {"class_path": "kdrl_lightning.tiny.TinyModel", "init_args": {"role": "student"}},
        {"slip": 0.2},
    ),
    "reward by mappings": ("data.reward", WEIGHTED, {"weights": {"a": 1.0, "b": 3.0}}),
    "prompts": ("data.train_prompts", ADDITION, {"seed": 5}),
    "evaluation": ("data.val_prompts", ADDITION, {"seed": 5}),
    "engine": (
        "data.rollout_engine",
        {"class_path": "TransformersEngine", "init_args": {"max_sequences": 3}},
        {"max_cached_tokens": 4096},
    ),
    "strategy": (
        "trainer.strategy",
        {"class_path": "DDPStrategy", "init_args": {"static_graph": True}},
        {"find_unused_parameters": True},
    ),
    "logger": (
        "trainer.logger",
        {"class_path": "CSVLogger", "init_args": {"save_dir": "x", "name": "n"}},
        {"name": "z"},
    ),
    "inside a class": (
        "model.teacher",
        {"class_path": "CachedTeacher", "init_args": {
            "teacher": {"class_path": "LocalTeacher", "init_args": {"model": "a/b"}}, "path": "p"}},
        {"teacher": {"dtype": "bfloat16"}},
    ),
    "null for all lines that are comments": ("model.optimizer", ADAMW, {"init_args": None}),
}  # fmt: skip


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_over_a_class_keep_its_other_arguments(case: str) -> None:
    _, base, over = ARGUMENTS[case]
    spec = {"class_path": base, "init_args": {}} if isinstance(base, str) else base
    made_of = merge(base, over, "model.x")
    assert made_of["class_path"] == spec["class_path"]
    if case == "inside a class":
        assert made_of["init_args"]["teacher"]["init_args"] == {"model": "a/b", **over["teacher"]}
        assert made_of["init_args"]["path"] == "p"
    else:
        given = over if "init_args" not in over else {}
        assert made_of["init_args"] == spec["init_args"] | given
    assert take_notes() == []


# Setting, mapping in the base, mapping in the file over it, and what they give.
MAPPINGS: dict[str, tuple[str, Any, dict[str, Any], Any]] = {
    "max_time": ("trainer.max_time", {"hours": 1}, {"minutes": 30}, {"hours": 1, "minutes": 30}),
    "sets": ("data.val_prompts", SETS, {"b": {"samples": 3}, "c": {"prompts": ROWS[:1]}}, None),
    "template_args": (
        "data.train_prompts",
        {"class_path": "JSONLPrompts", "init_args": {
            "path": "x", "chat": True, "template_args": {"a": 1, "b": {"c": 1, "d": 2}}}},
        {"template_args": {"b": {"c": 3}, "e": "007"}},
        {"a": 1, "b": {"c": 3, "d": 2}, "e": "007"},
    ),
    "rewards": ("data.reward", WEIGHTED, {"rewards": {"c": "ExactMatch"}}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", MAPPINGS)
def test_two_files_merge_mappings_as_a_base_does(
    case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KDRLCLI, "instantiate_classes", lambda self: None)
    name, base, over, wanted = MAPPINGS[case]
    one, two = given_twice(name, base, over)
    assert one == two
    if wanted is not None:
        assert wanted in (one, one.get("init_args", {}).get("template_args"))
    elif case == "sets":
        assert list(one) == ["a", "b", "c"] and one["b"]["samples"] == 3
    else:
        assert list(one.init_args.rewards) == ["a", "b", "c"]
    assert "note: " not in capsys.readouterr().out


@pytest.mark.parametrize(
    "case", ["optimizer", "a class by its name", "evaluation", "inside a class"]
)
def test_a_base_gives_what_two_files_give(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = given_twice(*ARGUMENTS[case])
    assert one == two
    assert "note: " not in capsys.readouterr().out


def given_twice(name: str, base: Any, over: Any) -> tuple[Any, Any]:
    """Return a setting of a file over its ``base``, and of the same file as a second one."""
    group, key = name.split(".")
    config = yaml.safe_load(CONFIG)
    config[group][key] = base
    Path("config.yaml").write_text(yaml.safe_dump(config))
    over = {group: {key: over}}
    Path("over.yaml").write_text(yaml.safe_dump(over))
    Path("layered.yaml").write_text(yaml.safe_dump({"base": "config.yaml", **over}))
    one = made("--config=layered.yaml").config[group][key]
    return one, made("--config=config.yaml", "--config=over.yaml").config[group][key]


# What a base has, what replaces it, and the note.
LOST = {
    "a list by a mapping": (
        CALLBACKS,
        {"a": 1},
        "`a.b` replaces the list of its base, so CPUThreads, StepProfile have no effect.",
    ),
    "a list by a number": (CALLBACKS, 5, "so CPUThreads, StepProfile have no effect."),
    "a list by a class": (
        CALLBACKS,
        "StepProfile",
        "so CPUThreads has no effect. Write `b+` to add to the list.",
    ),
    "a mapping by a list": (
        SETS,
        ROWS,
        "`a.b` replaces the settings of its base, so `a`, `b` have no effect.",
    ),
    "a mapping by a number": (SETS, 5, "so `a`, `b` have no effect."),
    "rows by a mapping": (ROWS, SETS, "so each of its 2 rows has no effect."),
    "rows by a class": (ROWS, ADDITION, "so each of its 2 rows has no effect."),
    "a class by a mapping by name": (
        ADDITION,
        SETS,
        "`a.b` replaces the settings of its base, so `size` of ColumnAddition has no effect.",
    ),
    "a class by rows": (ADDITION, ROWS, "so `size` of ColumnAddition has no effect."),
    "a class by a word": (SGD, "auto", "so `lr`, `momentum` of SGD has no effect."),
    "a class by true": (SGD, True, "so `lr`, `momentum` of SGD has no effect."),
    "a class by another": (
        SGD,
        "torch.optim.Adam",
        "`a.b`: Adam replaces SGD, so `lr`, `momentum` of SGD has no effect.",
    ),
}


@pytest.mark.parametrize("case", LOST)
def test_what_another_kind_of_value_replaces_is_named(case: str) -> None:
    base, over, words = LOST[case]
    (note,) = notes_of(base, over)
    assert note.endswith(words)


def test_entries_that_a_base_adds_are_no_longer_added() -> None:
    made_of = merge({"b+": CALLBACKS}, {"b": ["StepProfile"]}, "a")
    assert made_of == {"b": ["StepProfile"]}
    (note,) = take_notes()
    assert "so CPUThreads has no effect" in note


NOTHING: dict[str, tuple[Any, Any]] = {
    "nothing wanted": (CALLBACKS, None),
    "switched off": (SGD, False),
    "numbers": ([1, 2], 3),
    "rows by rows": (ROWS, ROWS[:1]),
    "the same class by its name": (SGD, "SGD"),
    "defaults of a class": (
        {"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.9, 0.999]}},
        [1],
    ),
}


@pytest.mark.parametrize("case", NOTHING)
def test_what_is_asked_for_is_no_loss(case: str) -> None:
    assert notes_of(*NOTHING[case]) == []


# The same at the command line, where jsonargparse lays one file over the other.
FILES = {
    "a mapping by rows": (SETS, ROWS, "so `a`, `b` have no effect."),
    "rows by a class": (ROWS, ADDITION, "so each of its 2 rows has no effect."),
    "a class by a mapping by name": (ADDITION, SETS, "so `size` of ColumnAddition has no effect."),
    "a class by rows": (ADDITION, ROWS, "so `size` of ColumnAddition has no effect."),
}


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("how", ["base", "files"])
def test_a_later_file_names_what_it_drops(
    case: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base, over, words = FILES[case]
    config = yaml.safe_load(CONFIG)
    config["data"]["val_prompts"] = base
    Path("config.yaml").write_text(yaml.safe_dump(config))
    second: dict[str, Any] = {"data": {"val_prompts": over}}
    second |= {"base": "config.yaml"} if how == "base" else {}
    Path("over.yaml").write_text(yaml.safe_dump(second))
    made(*(["--config=config.yaml"] if how == "files" else []), "--config=over.yaml")
    notes = [x for x in capsys.readouterr().out.splitlines() if x.startswith("note: ")]
    assert len(notes) == 1
    assert notes[0].startswith("note: `data.val_prompts` replaces ") and notes[0].endswith(words)


def test_a_wrong_mapping_of_a_base_is_named_although_a_list_replaces_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("over.yaml").write_text("trainer: {callbacks: {a: 1}}")
    Path("config.yaml").write_text(
        "base: over.yaml\n" + CONFIG.replace("max_steps: 1", "max_steps: 1, callbacks: []")
    )
    made("--config=config.yaml")
    assert "replaces the settings of its base, so `a` has no effect." in capsys.readouterr().out
