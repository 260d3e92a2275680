"""Settings that a second file or a flag replaces are named, and nothing of them stays."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kdrl_lightning.__main__ import main
from kdrl_lightning.cli.main import KDRLCLI
from kdrl_lightning.cli.settings import private

CONFIG = """
model: {student: some/model, teacher: {class_path: LocalTeacher, init_args: {model: some/model}},
  objective: {class_path: KDRL, init_args: {teacher_kl_coef: 0.1, selection: [{class_path: Gates,
  init_args: {alignment_threshold: 0.5}}]}}}
data:
  train_prompts: [{prompt: "1"}, {prompt: "2"}, {prompt: "3"}]
  val_prompts: {a: {prompts: [{prompt: "1"}]}}
  reward: {class_path: WeightedRewards, init_args: {rewards: {one: ExactMatch}}}
trainer: {max_steps: 1, accelerator: cpu, logger: {class_path: CSVLogger, init_args: {save_dir: x}},
  callbacks: [{class_path: CPUThreads, init_args: {threads: 1}}, StepProfile]}
"""
KDRL = "model: {objective: {init_args: "
REWARDS = "data: {reward: {init_args: {rewards: "
LISTS = {
    "trainer.callbacks": ("trainer: {callbacks: [StepProfile]}", "callbacks=[StepProfile]"),
    "model.objective.selection": (KDRL + "{selection: []}}}", "selection=[]"),
    "data.val_prompts": (
        "data: {val_prompts: {b: {prompts: [{prompt: x}]}}}",
        "val_prompts={b: {prompts: [{prompt: x}]}}",
    ),
    "data.reward.rewards": (REWARDS + "{two: ExactMatch}}}}", "rewards={two: ExactMatch}"),
    "trainer.logger": (
        "trainer: {logger: [{class_path: TensorBoardLogger, init_args: {save_dir: x}}]}",
        "logger=[{class_path: TensorBoardLogger, init_args: {save_dir: x}}]",
    ),
}
LOST = {
    "trainer.callbacks": "CPUThreads has no effect. Write `callbacks+` to add to the list.",
    "model.objective.selection": "Gates has no effect. Write `selection+` to add to the list.",
    "data.val_prompts": "`a` has no effect. Repeat it to keep it.",
    "data.reward.rewards": "`one` has no effect. Repeat it to keep it.",
    "trainer.logger": "CSVLogger has no effect. Write `logger+` to add to the list.",
}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG)


def made(*args: str) -> KDRLCLI:
    return KDRLCLI.run(["--config=config.yaml", *args], instantiate_only=True)


def notes(capsys: pytest.CaptureFixture[str]) -> list[str]:
    lines = capsys.readouterr().out.splitlines()
    notes = [line for line in lines if line.startswith("note: ")]
    return [line for line in notes if not re.search(r"\w replaces \w", line)]  # a class by another


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("how", ["file", "flag", "group file"])
def test_what_a_later_value_takes_away_is_named(
    name: str, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file, flag = LISTS[name]
    group, _, inner = name.partition(".")
    Path("second.yaml").write_text(file)
    Path("group.yaml").write_text(file.removeprefix(f"{group}: {{").removesuffix("}"))
    flags = {
        "file": "--config=second.yaml",
        "flag": f"--{name.rpartition('.')[0]}.{flag}",
        "group file": f"--{group}=group.yaml",
    }
    if how == "group file" and "." in inner:  # needs the class that it is an argument of
        return
    made(flags[how])
    merged = "Repeat" in LOST[name] and how != "flag"  # files keep what a mapping had
    lost = [] if merged else [f"note: `{name}` replaces an earlier value, so {LOST[name]}"]
    assert notes(capsys) == lost


@pytest.mark.parametrize(
    "flag",
    [
        "--config={trainer: {callbacks+: [DeviceStatsMonitor]}}",
        "--trainer.callbacks+=DeviceStatsMonitor",
        "--trainer.callbacks+=[DeviceStatsMonitor]",
        "--trainer.callbacks+={class_path: DeviceStatsMonitor}",
        "--trainer.callbacks.rollout=2",
        "--data.val_prompts.b={prompts: [{prompt: x}]}",
        "--trainer.logger={class_path: CSVLogger, init_args: {save_dir: y}}",
        "--trainer.logger=false",
        "--config={trainer: {callbacks: null}}",
        "--trainer.callbacks=[{class_path: CPUThreads, init_args: {threads: 2}}, StepProfile]",
        "--config=config.yaml",
    ],
)
def test_what_takes_nothing_away_is_no_matter(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made(flag)
    assert notes(capsys) == []


@pytest.mark.parametrize(
    "value", ["DeviceStatsMonitor", "[DeviceStatsMonitor]", "{class_path: DeviceStatsMonitor}"]
)
def test_a_flag_with_a_plus_adds_to_the_list(value: str) -> None:
    given = made(f"--trainer.callbacks+={value}").config.trainer.callbacks
    names = [one.class_path.rsplit(".", 1)[-1] for one in given]
    assert names == ["CPUThreads", "StepProfile", "DeviceStatsMonitor"]
    assert given[0].init_args.threads == 1


def test_a_default_is_no_loss(capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.yaml").write_text(
        CONFIG.replace("logger: {class_path: CSVLogger, init_args: {save_dir: x}},", "")
    )
    made(f"--trainer.{LISTS['trainer.logger'][1]}")
    assert notes(capsys) == []


def test_a_class_takes_no_arguments_of_another_at_its_place(
    capsys: pytest.CaptureFixture[str],
) -> None:
    profile = "{class_path: StepProfile, init_args: {rollout: 7, operators: 3}}"
    Path("second.yaml").write_text(f"trainer: {{callbacks: [{profile}]}}")
    Path("third.yaml").write_text("trainer: {callbacks: [StepProfile]}")
    (last,) = made("--config=second.yaml", "--config=third.yaml").config.trainer.callbacks
    assert (last.init_args.rollout, last.init_args.operators) == (1, 15)
    words = "so `rollout`, `operators` of StepProfile has no effect. Write `callbacks+` to add to"
    assert words in notes(capsys)[-1]


ADAMW = "{class_path: torch.optim.AdamW, init_args: {lr: 1e-5, betas: %s, amsgrad: %s}}"
SGD = "model: {optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}}"


@pytest.mark.parametrize("how", ["files", "base", "flags"])
@pytest.mark.parametrize(
    ("old", "lost"),
    [
        (ADAMW % ("[0.9, 0.999]", "false"), []),  # AdamW's own, as a saved configuration has them
        (
            ADAMW % ("[0.8, 0.9]", "true"),
            ["SGD replaces AdamW, so `betas`, `amsgrad` of AdamW has no effect."],
        ),
    ],
)
def test_a_class_that_replaces_another_is_noted_once_for_what_was_chosen(
    how: str, old: str, lost: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("old.yaml").write_text(f"base: config.yaml\nmodel: {{optimizer: {old}}}")
    Path("new.yaml").write_text(SGD if how == "files" else f"base: old.yaml\n{SGD}")
    flags = {
        "files": ["--config=old.yaml", "--config=new.yaml"],
        "base": ["--config=new.yaml"],
        "flags": ["--config=old.yaml", "--model.optimizer=torch.optim.SGD",
                  "--model.optimizer.lr=0.1"],
    }[how]  # fmt: skip
    KDRLCLI.run(flags, instantiate_only=True)
    said = [x for x in capsys.readouterr().out.splitlines() if x.startswith("note: ")]
    assert [re.sub(r"^note: (`model\.optimizer`: )?", "", line) for line in said] == lost


def test_rows_in_place_of_a_source_are_no_list_to_add_to(
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = "train_prompts: {class_path: kdrl_lightning.tiny.ColumnAddition}"
    rows = 'train_prompts: [{prompt: "1"}, {prompt: "2"}, {prompt: "3"}]'
    assert rows in CONFIG
    Path("config.yaml").write_text(CONFIG.replace(rows, source))
    made("--config=data: {train_prompts: [{prompt: x}]}")
    assert notes(capsys) == []


NULLS = [
    "data.rollout.mask_truncated",
    "data.rollout.temperature",
    "data.evaluation.samples",
    "data.overlong_prompts",
]
NULLS += ["model.activation_checkpointing", "model.optimizer", "trainer.devices"]


@pytest.mark.parametrize("name", NULLS)
def test_null_is_refused_where_there_is_no_none(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("second.yaml").write_text(f"{name}: null")
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config=config.yaml", "--config=second.yaml"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: `{name}`") and "None" in line


def test_null_is_refused_inside_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    Path("second.yaml").write_text(
        "trainer: {callbacks: [{class_path: StepProfile, init_args: {rollout: null}}]}"
    )
    with pytest.raises(SystemExit):
        main(["fit", "--config=config.yaml", "--config=second.yaml"])
    assert (
        "`trainer.callbacks.rollout` must be a whole number: got None." in capsys.readouterr().err
    )


def test_null_is_taken_where_there_is_none() -> None:
    text = "model: {teacher: null, lora: null}\ntrainer: {callbacks: null, max_epochs: null}"
    Path("second.yaml").write_text(text.replace("teacher: null, ", ""))
    assert made("--config=second.yaml").config.trainer.max_epochs is None


def test_the_range_of_jsonargparse_is_the_projects() -> None:
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert f'"jsonargparse[signatures]{private.CHECKED}"' in text
