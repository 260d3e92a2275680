"""docs/tasks.md: every block of YAML builds what it shows, and every class has one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import datasets
import pytest
import yaml

from kdrl_lightning import prompts, rewards
from kdrl_lightning.cli.main import KDRLCLI

PAGE = Path(__file__).parents[2] / "docs/tasks.md"
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
OWN = {"train_prompts": [{"prompt": "1+2=", "answer": "3"}], "reward": "ExactMatch"}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda text: re.sub(r"\W+", "_", text)[:60])
def test_a_block_builds_what_it_shows(
    block: str, tmp_path: Path, student_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"{i}+1=", "reward_model": {"ground_truth": str(i + 1)}} for i in range(3)]
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).to_parquet("train.parquet")
    Path("train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("train.csv").write_text("prompt,answer\n1+2=,\"['3', '3.0']\"\n")
    shown = yaml.safe_load(block)
    config = {
        "model": {"student": student_folder, "objective": {"class_path": "GRPO"}},
        "data": {**OWN, **shown},
        "trainer": {"accelerator": "cpu", "logger": False, "max_steps": 1},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))
    data = KDRLCLI.run(["--config", "run.yaml"], instantiate_only=True).datamodule
    for name, built in (("train_prompts", data.train_prompts), ("reward", data.rewards.reward)):
        if name in shown:
            assert type(built).__name__ == shown[name]["class_path"]
    assert data.train_prompts[0]["prompt"]
    assert len(data.train_prompts) > 0


def test_every_class_is_shown() -> None:
    shown = set(re.findall(r"class_path: (\w+)", "\n".join(BLOCKS)))
    bases = {"BatchReward", "Reward", "TaskReward"}
    classes = {name for name in prompts.__all__ if name.endswith("Prompts") and name != "Prompts"}
    kinds = rewards.TaskReward.__subclasses__() + rewards.BatchReward.__subclasses__()
    ours = "kdrl_lightning.rewards"
    named = {kind.__name__ for kind in kinds if kind.__module__.startswith(ours)}
    assert shown == classes | (named - bases)
    assert {"HFPrompts", "MathReward", "CodeReward", "WeightedRewards"} <= shown
