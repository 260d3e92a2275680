"""Messages that concern all processes are printed once."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from helpers.processes.ready import WRITTEN, run
from kdrl_lightning.__main__ import main
from kdrl_lightning.common import distributed as together

ROOT = Path(__file__).parents[3]
CONFIG = """
model: {{student: {student}, objective: {{class_path: GRPO}}}}
data:
  train_prompts: {{class_path: kdrl_lightning.tiny.ColumnAddition, init_args: {{size: 8}}}}
  reward: kdrl_lightning.tiny.addition_reward
  evaluation: {{samples: 4}}
  rollout: {{max_tokens: 125}}
trainer: {{max_steps: 1, accelerator: cpu, devices: 2, strategy: ddp}}
"""


def test_two_ranks_print_a_note_and_an_error_once(student_folder: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG.format(student=student_folder))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    out = run(["fit", "--config", "config.yaml"], tmp_path, env)
    assert out.returncode == 2
    assert out.stdout.count("note: `data.evaluation.samples` has no effect") == 1
    assert out.stderr.count("error: ") == 1
    assert "error: `train_prompts` must have at most 3 tokens a prompt" in out.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"config.yaml", *WRITTEN}


class Gone:
    """The store of a process that has ended."""

    def add(self, key: str, amount: int) -> int:
        raise distributed.DistNetworkError("connection reset")


def test_the_first_process_with_a_message_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = distributed.HashStore()
    monkeypatch.setattr(together, "_store", lambda: store)
    said = [together.first_to_say(words) for words in ("a", "a", "b", "a", "\ud800")]
    assert said == [True, False, True, False, True]
    store = Gone()
    assert together.first_to_say("a")
    store = None
    assert together.first_to_say("a")


class SaidLater:
    """The store of a group whose first process reports something at the third question."""

    def __init__(self) -> None:
        self.asked = 0

    def add(self, key: str, amount: int) -> int:
        self.asked += 1
        return int(self.asked > 2) if amount == 0 else 1


def test_after_ctrl_c_the_others_let_the_first_process_speak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store: Any = SaidLater()
    monkeypatch.setattr(together, "_store", lambda: store)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not together.first_to_say("a", waits_s=60.0)
    assert store.asked == 3
    store = distributed.HashStore()
    assert together.first_to_say("a", waits_s=0.1)  # it was not interrupted
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert together.first_to_say("b", waits_s=60.0)


@pytest.mark.parametrize(("rank", "start"), [("0", "error: "), ("1", "\nerror: ")])
def test_an_error_does_not_follow_the_first_process_s_progress_bar(
    rank: str, start: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit):
        main(["evaluate", "--config=none.yaml"])
    assert capsys.readouterr().err.startswith(start)


def test_ranks_of_torchrun_meet_before_they_have_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    assert together._store() is None
    host = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(host.port))
    assert [together.first_to_say("a") for _ in range(2)] == [True, False]
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert together.first_to_say("a")


def test_tasks_of_slurm_on_a_node_say_it_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert [together.first_to_say(words) for words in "aab"] == [True, False, True]
    monkeypatch.setenv("SLURM_STEP_ID", "1")  # another `srun` of the job
    assert together.first_to_say("a")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    assert together.first_to_say("a") and together.first_to_say("a")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert together.first_to_say("a") and together.first_to_say("a")


def test_a_group_knows_whether_one_of_it_has_spoken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert together.has_spoken()  # no group: each speaks for itself
    store: Any = distributed.HashStore()
    monkeypatch.setattr(together, "_store", lambda: store)
    assert not together.has_spoken()
    together.first_to_say("a")
    assert together.has_spoken()
    monkeypatch.setattr(together, "ANSWER_S", 0.05)
    monkeypatch.setattr(together, "_store", lambda: time.sleep(1))
    assert not together.has_spoken()


@pytest.mark.parametrize(("rank", "count"), [("0", 1), ("1", 0)])
def test_evaluate_prints_its_notes_on_the_first_rank(
    rank: str,
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", int(rank))
    with pytest.raises(SystemExit):
        main(["evaluate", "--config=rlad", "--output=a", "--output=b"])
    assert capsys.readouterr().out.count("note: `--output` is given 2 times") == count
