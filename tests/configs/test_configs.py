"""Every configuration instantiates, prints, and takes overrides."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from kdrl_lightning.__main__ import main
from kdrl_lightning.cli.layered_yaml import load_with_base
from kdrl_lightning.cli.main import KDRLCLI, as_seed
from kdrl_lightning.cli.settings.layers.merging import merge
from kdrl_lightning.errors import ConfigurationError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_instantiates(path: Path) -> None:
    cli = KDRLCLI.run(["--config", str(path)], instantiate_only=True)
    assert cli.trainer.max_steps > 0
    assert cli.datamodule.updates_per_rollout >= 1
    if cli.model.lr_scheduler_callable is not None:
        config = cli.config.model.lr_scheduler
        assert config.init_args.total_iters == cli.trainer.max_steps


def test_the_five_methods_are_there() -> None:
    assert {p.stem for p in CONFIGS} >= {
        "grpo",
        "kdrl",
        "kdrl_annealing",
        "on_policy_distillation",
        "rlad",
    }


def test_overrides_win_over_the_file() -> None:
    cli = KDRLCLI.run(
        [
            f"--config={ROOT / 'configs/rlad.yaml'}",
            "--model.objective.trrd_alpha=0.7",
            "--model.student=some/folder",
            "--data.rollout.group_size=4",
            "--seed_everything=7",
        ],
        instantiate_only=True,
    )
    assert cli.model.objective.coefficient("trrd_alpha") == 0.7
    assert cli.model.student_source == "some/folder"
    assert (cli.datamodule.rollout.group_size, cli.datamodule.seed) == (4, 7)


@pytest.mark.parametrize(("value", "seed"), [(3, 3), (0, 0), (True, 0), (False, 0), (None, 0)])
def test_one_seed_for_everything(value: bool | int | None, seed: int) -> None:
    assert as_seed(value) == seed


def said(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Return what a command prints that only tells something."""
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--help_all"], ["{fit,validate,test,predict}", "export", "evaluate", "serve"]),
        (
            ["fit", "--help_all"],
            ["--data.rollout.group_size", "completions per prompt", "--report.export"],
        ),
        (["export", "--help"], ["--ckpt_path", "a folder of shards"]),
        (["evaluate", "--help_all"], ["--models", "without training"]),
        (["serve", "--help"], ["--model", "--expose", "VLLM_API_KEY"]),
    ],
    ids=lambda x: x[0].strip("-{"),
)
def test_help_reads(flags: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(said(capsys, *flags).split())
    for word in words:
        assert word in text


def test_print_config_can_be_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["fit", "--print_config", "--config"]
    once = said(capsys, *command, str(ROOT / "configs/kdrl_annealing.yaml"))
    Path("whole.yaml").write_text(once)
    assert said(capsys, *command, "whole.yaml") == once
    assert "teacher_kl_coef: 0.3" in once and "decrement: 0.03" in once


def test_base_is_merged_and_another_class_replaces_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("x: {class_path: A, init_args: {p: 1}}\ny: [1, 2]\nz: 1\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nx: {init_args: {q: 2}}\ny: [3]\n")
    text = "base: b.yaml\nz: 2\n"
    assert load_with_base(text, str(tmp_path / "c.yaml")) == {
        "x": {"class_path": "A", "init_args": {"p": 1, "q": 2}},
        "y": [3],
        "z": 2,
    }
    assert merge({"class_path": "A", "init_args": {"p": 1}}, {"class_path": "B"}) == {
        "class_path": "B"
    }


def test_a_missing_or_circular_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigurationError, match=r"a.yaml, which is its own base"):
        load_with_base("base: a.yaml", str(tmp_path / "c.yaml"))
    with pytest.raises(ConfigurationError, match=r"nothing.yaml, which is not a file"):
        load_with_base("base: nothing.yaml", str(tmp_path / "c.yaml"))


def test_a_base_that_says_nothing_of_its_settings_is_refused(tmp_path: Path) -> None:
    base, over = tmp_path / "a.yaml", str(tmp_path / "c.yaml")
    base.write_text("data.max_tokens = 4\n")
    with pytest.raises(
        ConfigurationError, match=r"^`base` must name a file of settings by name: got .*a.yaml "
    ):
        load_with_base("base: a.yaml", over)
    base.write_text("data:\n  max_tokens:4\n")
    words = r"^`data` must have settings by name: got 'max_tokens:4' in .*a\.yaml\. Write"
    with pytest.raises(ConfigurationError, match=words):
        load_with_base("base: a.yaml\ndata: {group_size: 2}", over)
    base.write_text("# nothing yet\n")
    rest = "data: {rollout: {group_size: 2}}"
    assert load_with_base(f"base: a.yaml\n{rest}", over) == yaml.safe_load(rest)
