"""Models, checkpoints and a teacher in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.short_runs import fit, make_data, make_module
from kdrl_lightning import GRPO
from kdrl_lightning.__main__ import main
from kdrl_lightning.callbacks import FSDPCheckpoint
from kdrl_lightning.cli.evaluate import is_checkpoint, pruned
from kdrl_lightning.engines import TransformersEngine

SET = {"class_path": "kdrl_lightning.tiny.ColumnAddition", "init_args": {"size": 3}}
CONFIG: dict[str, Any] = {
    # A configuration for training: most of it does not concern an evaluation.
    "model": {"student": "nowhere", "objective": {"class_path": "Unknown"}},
    "report": {"export": False},
    "data": {
        "train_prompts": {"class_path": "NotThere"},
        "val_prompts": SET,
        "test_prompts": {
            "near": {
                "prompts": SET,
                "samples": 3,
                "temperature": 1.0,
                "top_p": 0.9,
                "k": [2, 3],
            },
            "far": {"prompts": SET, "max_tokens": 5},
        },
        "reward": "kdrl_lightning.tiny.addition_reward",
        "rollout": {
            "max_tokens": 8,
        },
    },
    "trainer": {"accelerator": "cpu", "max_steps": 7, "logger": {"class_path": "NotThere"}},
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    (tmp_path / "my.yaml").write_text("base: base.yaml\nseed_everything: 5\n")
    return "my.yaml"


def test_models_and_checkpoints_stand_in_one_table(
    tmp_path: Path,
    student_folder: str,
    teacher_folder: str,
    config: str,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[TransformersEngine] = []
    monkeypatch.setattr(TransformersEngine, "close", lambda self: closed.append(self))
    saver = FSDPCheckpoint(dirpath=str(tmp_path / "kept"), monitor=None)
    module = make_module(student_folder, None, GRPO())
    data = make_data(val_prompts=None, minibatches_per_rollout=1, max_tokens=24)
    fit(tmp_path, module, data, [saver], max_steps=1, enable_checkpointing=True)
    module.export(str(tmp_path / "after"))
    capsys.readouterr()
    models = {
        "before": student_folder,
        "after": str(tmp_path / "after"),
        "checkpoint": saver.last_model_path,
        "teacher": teacher_folder,
    }
    flags = [f"--models.{name}={path}" for name, path in models.items()]
    main(["evaluate", "--config", config, *flags, "--output=out"])
    report = json.loads(Path("out/evaluation.json").read_text())
    assert report["models"] == models and report["seed"] == 5
    assert report["sets"]["near"] == {
        "prompts": 3,
        "samples": 3,
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.0,
        "max_tokens": 8,
        "k": [2, 3],
    }
    assert len(set(closed)) == len(models)  # each engine ends before the next one starts
    results = report["results"]
    assert results["checkpoint"] == results["after"] != results["before"]
    assert {"accuracy", "accuracy_low", "pass_at_2", "majority_at_3"} <= set(
        results["teacher"]["near"]
    )
    assert results["teacher"]["far"]["length_mean"] <= 5.0
    table = Path("out/evaluation.md").read_text()
    assert table in capsys.readouterr().out
    lines = table.splitlines()
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    assert rows[0] == [
        *("set", "model", "pass@1", "95 %", "pass@2", "majority@2", "pass@3", "majority@3"),
        *("length", "right", "wrong", "truncated"),
    ]
    names = ("near", "far", "average")
    assert [row[:2] for row in rows[2:]] == [[s, m] for s in names for m in models]
    assert rows[9][4] == "-"
    for model in models:  # the mean over sets, each counted once
        of = {name: values["accuracy"] for name, values in results[model].items()}
        assert of["average"] == pytest.approx((of["near"] + of["far"]) / 2)
    assert lines[-2].startswith("- near: 3 samples per prompt at temperature 1, top-p 0.9, at most")
    assert sorted(p.name for p in Path("out").iterdir()) == ["evaluation.json", "evaluation.md"]
    assert not Path("lightning_logs").exists() and not Path("runs").exists()


def test_what_the_command_refuses(config: str, capsys: Any) -> None:
    def line(*args: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["evaluate", *args])
        assert stop.value.code == 2
        (text,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        return str(text)

    assert line("--config", config) == (
        "error: `models` must name at least one model: got none. Give `--models.NAME PATH`."
    )
    assert (
        "`config` must be a YAML file, or name a configuration of the library: got none.yaml"
        in line("--config=none.yaml")
    )
    Path("list.yaml").write_text("[1]")
    wrong = "`config` must contain settings by name: got list.yaml, which is not a mapping."
    assert wrong in line("--config=list.yaml")
    assert "a model path must be a Hugging Face folder" in line(
        "--config", config, "--models.a", "not/there"
    )
    assert "`python -m kdrl_lightning evaluate --help`" in line("--data.valprompts=1")


def test_only_what_an_evaluation_needs_is_read(config: str) -> None:
    (kept,) = pruned(["--config", config])
    settings = yaml.safe_load(kept.removeprefix("--config="))
    assert set(settings) == {"seed_everything", "data", "trainer"}
    assert "train_prompts" not in settings["data"]
    assert pruned(["--output", "x"]) == ["--output", "x"]


def test_what_counts_as_a_checkpoint(tmp_path: Path, student_folder: str) -> None:
    assert not is_checkpoint(student_folder) and not is_checkpoint("Qwen/Qwen3-0.6B")
    (tmp_path / "file.ckpt").touch()
    (tmp_path / "folder.ckpt").mkdir()
    (tmp_path / "folder.ckpt/meta.pt").touch()
    assert is_checkpoint(str(tmp_path / "file.ckpt"))
    assert is_checkpoint(str(tmp_path / "folder.ckpt"))


def test_a_list_of_models_may_stand_in_the_configuration(config: str, student_folder: str) -> None:
    Path("models.yaml").write_text(f"base: {config}\nmodels: {{a: {student_folder}}}\noutput: o\n")
    main(["evaluate", "--config=models.yaml", "--data.test_prompts=null"])
    assert list(json.loads(Path("o/evaluation.json").read_text())["sets"]) == [""]
