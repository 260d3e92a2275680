"""Checkpoints on the command line: what is found, and one line for what cannot be."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import Tensor

from kdrl_lightning.__main__ import main
from kdrl_lightning.checkpoints.writer import together
from kdrl_lightning.errors import TrainingStopped

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*of the (completions|groups):UserWarning",
    "ignore:The number of training batches:UserWarning",
    "ignore:.*there is no last checkpoint available:UserWarning",
)


@pytest.fixture
def start(tmp_path: Path, student_folder: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a subcommand of the program in a folder of its own."""
    for name in ("report.plot_curves", "imitation_stats.plot_imitation"):
        monkeypatch.setattr(f"kdrl_lightning.callbacks.{name}", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    prompts = {"class_path": "kdrl_lightning.tiny.ColumnAddition", "init_args": {"size": 8}}
    config = {
        "model": {"student": student_folder, "objective": {"class_path": "GRPO"}},
        "data": {
            "train_prompts": prompts,
            "val_prompts": prompts,
            "reward": "kdrl_lightning.tiny.addition_reward",
            "rollout": {
                "prompts_per_rollout": 4,
                "group_size": 2,
                "max_tokens": 8,
            },
        },
        "trainer": {"max_steps": 2, "accelerator": "cpu"},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))

    def run(command: str, *flags: str) -> None:
        main([command, "--config", "run.yaml", *flags])

    return run


def refused(start: Any, capsys: pytest.CaptureFixture[str], *flags: str, code: int = 2) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        start(*flags)
    assert error.value.code == code
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def version(number: int) -> Path:
    return Path(f"runs/kdrl_lightning/version_{number}")


def test_last_is_a_fresh_start_where_there_is_none(
    start: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that a job may always be started with it."""
    start("fit", "--ckpt_path=last")
    assert "continuing from" not in capsys.readouterr().out
    first = version(0) / "checkpoints/step=00000002.ckpt"
    assert first.exists()
    start("fit", "--ckpt_path=last", "--trainer.max_steps=3", "--report.export=false")
    assert f"continuing from {first} at step 2" in capsys.readouterr().out.replace(
        f"{Path.cwd()}/", ""
    )
    assert (version(1) / "checkpoints/step=00000003.ckpt").exists()
    start("validate", "--ckpt_path=last")
    assert "val/accuracy" in capsys.readouterr().out
    start("fit", "--ckpt_path=last", "--trainer.max_steps=3", "--report.export=false")
    assert torch.load(version(1) / "checkpoints/step=00000003.ckpt")["global_step"] == 3


def test_no_checkpoints_where_none_are_wanted(start: Any) -> None:
    start("fit", "--trainer.enable_checkpointing=false", "--report.export=false")
    assert (version(0) / "summary.json").exists()
    assert not (version(0) / "checkpoints").exists()


def test_the_settings_of_the_group_arrive(start: Any) -> None:
    start("fit", "--checkpoint.dirpath=kept", "--checkpoint.keep_last=2",
          "--checkpoint.save_top_k=0", "--checkpoint.monitor=null")  # fmt: skip
    names = {p.name for p in Path("kept").iterdir()}
    assert names == {"step=00000001.ckpt", "step=00000002.ckpt"}


def test_a_checkpoint_that_cannot_be_is_refused_in_one_line(
    start: Any, capsys: pytest.CaptureFixture[str], student_folder: str
) -> None:
    start("fit", "--report.export=false")
    file = version(0) / "checkpoints/step=00000002.ckpt"
    whole, flag = file.read_bytes(), Path("flag")
    on = "fit", "--trainer.max_steps=3", f"--ckpt_path={file}"
    line = refused(start, capsys, *on, "--model.objective=GSPO")
    assert "with the objective GSPO: got" in line and "made by GRPO" in line
    line = refused(start, capsys, *on, "--model.optimizer=torch.optim.SGD",
                   "--model.optimizer.lr=0.1")  # fmt: skip
    assert "`optimizer` must be AdamW to continue from" in line
    start("validate", f"--ckpt_path={file}", "--model.objective=GSPO")
    file.write_bytes(whole[: len(whole) // 2])
    assert "must be an intact checkpoint of this library: got" in refused(start, capsys, *on)
    # The newest is broken: `last` says so, and starts nothing else in its place.
    line = refused(start, capsys, "fit", "--ckpt_path=last", "--trainer.max_steps=3")
    assert "must be an intact checkpoint" in line and "Use an earlier one" in line

    class Runs:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {flag}",)

    saved = torch.load(_restored(file, whole))
    torch.save({**saved, "callbacks": Runs()}, file)
    assert "must be an intact checkpoint of this library: got" in refused(start, capsys, *on)
    assert not flag.exists()
    line = refused(start, capsys, "fit", f"--ckpt_path={student_folder}")
    assert "`ckpt_path` must be a" in line


def _restored(file: Path, whole: bytes) -> Path:
    file.write_bytes(whole)
    return file


@pytest.mark.parametrize("flag", ["val", "luck"])
def test_an_unknown_metric_is_refused_in_one_line(
    start: Any, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    line = refused(start, capsys, "fit", f"--checkpoint.monitor={flag}/luck")
    assert f"`monitor` must be a metric of the validation: got {flag}/luck. Known: " in line


def test_sigterm_before_the_first_step_is_no_error_of_the_program(
    start: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the student is measured before training there is nothing to save but the start."""
    before = signal.getsignal(signal.SIGTERM)
    real = pl.Trainer._run_sanity_check

    def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def sanity(self: Any) -> None:
        terminate()
        real(self)

    monkeypatch.setattr(pl.Trainer, "_run_sanity_check", sanity)
    stopped = "error: stopped by SIGTERM: nothing was saved."
    assert refused(start, capsys, "fit", "--trainer.max_steps=50", code=143) == stopped
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_one_rank_cannot_write_stops_the_others() -> None:
    def reduce(value: Tensor, operation: str) -> Tensor:
        return value + 1.0  # another rank failed

    module = SimpleNamespace(reduce=reduce)
    done: list[int] = []
    with pytest.raises(TrainingStopped, match="another process had to stop"):
        together(SimpleNamespace(global_step=3, lightning_module=module), lambda: done.append(1))
    assert done == [1]


def test_a_folder_without_checkpoints_is_refused(
    start: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    start("fit", "--report.export=false")
    shutil.rmtree(version(0) / "checkpoints")
    line = refused(start, capsys, "fit", f"--ckpt_path={version(0)}")
    assert "`ckpt_path` must be an intact checkpoint of this library" in line


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_last_goes_on_in_a_folder_with_a_name(
    strategy: str, start: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("fit", "--checkpoint.dirpath=kept", "--report.export=false",
             f"--trainer.strategy={strategy}", "--trainer.devices=1")  # fmt: skip
    start(*flags)
    start(*flags, "--ckpt_path=last", "--trainer.max_steps=3")
    assert "step=00000002.ckpt at step 2" in capsys.readouterr().out
    line = refused(start, capsys, *flags)
    assert "`dirpath` must be a folder without another run's checkpoints: got" in line
