"""The README's commands and examples work."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_ci_calls_the_second_command() -> None:
    second = blocks("bash")[1].strip()
    assert "pytest" in second
    script = (ROOT / ".ci/run").read_text().replace("pip install --quiet", "pip install")
    assert second in script


def test_commands_name_files_that_exist() -> None:
    for block in blocks("bash"):
        for path in re.findall(r"[\w/-]+\.(?:yaml|txt|py)", block):
            assert (ROOT / path).is_file(), path
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path


def test_every_config_of_the_table_exists() -> None:
    for name in re.findall(r"`(\w+\.yaml)` \|", README):
        assert (ROOT / "configs" / name).is_file(), name


def test_the_example_in_python_runs(tmp_path: Path) -> None:
    (code,) = blocks("python")
    assert len(code.strip().splitlines()) <= 40
    (tmp_path / "example.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr[-2000:]
    after = re.search(r"student after +([\d.]+)%", out.stdout)
    assert after is not None and float(after[1]) > 50, out.stdout


def test_the_example_configuration_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdrl_lightning.cli.main import KDRLCLI

    (text,) = blocks("yaml")
    assert yaml.safe_load(text)["model"]["student"] == "Qwen/Qwen3-0.6B"
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text('{"question": "1+1?", "answer": "2"}\n')
    (tmp_path / "own.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    cli = KDRLCLI.run(["--config", "own.yaml", "--trainer.precision=32"], instantiate_only=True)
    assert cli.datamodule.train_prompts[0]["prompt"] == [{"role": "user", "content": "1+1?"}]
    assert cli.model.objective.coefficient("teacher_kl_coef") == 0.002
