"""A run that is refused leaves no folder behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdrl_lightning.__main__ import main

CONFIG = """
model: {{student: {student}, objective: {{class_path: GRPO}}}}
data:
  train_prompts: {{class_path: kdrl_lightning.tiny.ColumnAddition, init_args: {{size: 8}}}}
  reward: kdrl_lightning.tiny.addition_reward
  max_tokens: 125
trainer: {{max_steps: 1, accelerator: cpu, logger: {{class_path: CSVLogger, init_args: {log}}}}}
"""


@pytest.mark.parametrize("before", [False, True])
def test_a_loggers_folder_goes_unless_it_was_there(
    before: bool,
    student_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    log = "{save_dir: here, name: a/b, version: c}"
    Path("config.yaml").write_text(CONFIG.format(student=student_folder, log=log))
    if before:
        Path("here/a").mkdir(parents=True)
        Path("here/a/mine.txt").touch()
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "config.yaml"])
    assert ended.value.code == 2
    assert "must have at most 3 tokens a prompt" in capsys.readouterr().err
    left = {str(p) for p in Path().rglob("*")}
    assert left == (
        {"config.yaml", "here", "here/a", "here/a/mine.txt"} if before else {"config.yaml"}
    )


@pytest.mark.parametrize("student", ["x" * 5000, "config.yaml/" + "y" * 300])
def test_so_it_does_if_a_path_cannot_be(
    student: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG.format(student=student, log="{save_dir: here}"))
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "config.yaml"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and len(line) < 1200
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("root", ["runs", "."])
def test_so_does_the_folder_of_a_run_without_a_logger(
    root: str,
    student_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Lightning refuses its own callback, after the run has written its configuration."""
    monkeypatch.chdir(tmp_path)
    text = CONFIG.format(student=student_folder, log="{}").replace("125", "8")
    Path("config.yaml").write_text(text)
    flags = ["--trainer.logger=false", f"--trainer.default_root_dir={root}"]
    flags += ["--trainer.callbacks=[LearningRateMonitor]", "--data.rollout.prompts_per_rollout=4"]
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "config.yaml", *flags])
    assert ended.value.code == 2
    assert "Cannot use `LearningRateMonitor`" in capsys.readouterr().err
    assert [str(p) for p in Path().rglob("*")] == ["config.yaml"]
    assert Path("config.yaml").read_text() == text
