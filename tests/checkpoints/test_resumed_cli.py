"""Checkpoints on the command line: which one is found, and one line if it cannot be used."""

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
from torch import Tensor

from helpers.program import refusal, version
from kdrl_lightning.checkpoints.writer import together
from kdrl_lightning.errors import TrainingStopped

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*of the (completions|groups):UserWarning",
    "ignore:The number of training batches:UserWarning",
    "ignore:.*there is no last checkpoint available:UserWarning",
)


def test_last_is_a_fresh_start_where_there_is_none(
    start: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that a job may always be started with it."""
    start("fit", "--ckpt_path=last")
    assert "continuing from" not in capsys.readouterr().out
    first = version(0) / "checkpoints/step=00000002.ckpt"
    assert first.exists()
    start("fit", "--ckpt_path=last", "--trainer.max_steps=3", "--report.export=false")
    out = capsys.readouterr().out.replace(f"{Path.cwd()}/", "")
    assert f"continuing from {first} at step 2" in out and "nothing was trained" not in out
    assert (version(1) / "checkpoints/step=00000003.ckpt").exists()
    start("validate", "--ckpt_path=last")
    assert "val/accuracy" in capsys.readouterr().out
    start("fit", "--ckpt_path=last", "--trainer.max_steps=3", "--report.export=false")
    words = "nothing was trained: `max_steps` 3 was reached before. Raise it to train on."
    assert capsys.readouterr().out.count(words) == 1
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
    line = refusal(start, capsys, *on, "--model.objective=GSPO")
    assert "with the objective GSPO: got" in line and "made by GRPO" in line
    line = refusal(start, capsys, *on, "--model.optimizer=torch.optim.SGD",
                   "--model.optimizer.lr=0.1")  # fmt: skip
    assert "`optimizer` must be AdamW to continue from" in line
    start("validate", f"--ckpt_path={file}", "--model.objective=GSPO")
    file.write_bytes(whole[: len(whole) // 2])
    assert "must be an intact checkpoint of this library: got" in refusal(start, capsys, *on)
    # The newest is broken: `last` says so, and starts nothing else in its place.
    line = refusal(start, capsys, "fit", "--ckpt_path=last", "--trainer.max_steps=3")
    assert "must be an intact checkpoint" in line and "Use an earlier one" in line

    class Runs:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {flag}",)

    saved = torch.load(_restored(file, whole))
    torch.save({**saved, "callbacks": Runs()}, file)
    assert "must be an intact checkpoint of this library: got" in refusal(start, capsys, *on)
    assert not flag.exists()
    line = refusal(start, capsys, "fit", f"--ckpt_path={student_folder}")
    assert "`ckpt_path` must be a" in line


def _restored(file: Path, whole: bytes) -> Path:
    file.write_bytes(whole)
    return file


@pytest.mark.parametrize("flag", ["val", "luck"])
def test_an_unknown_metric_is_refused_in_one_line(
    start: Any, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    line = refusal(start, capsys, "fit", f"--checkpoint.monitor={flag}/luck")
    what = "must be a metric of the validation"
    if flag == "luck":  # it may be logged in training
        what = "of FSDPCheckpoint must be a metric that is logged"
    assert f"`monitor` {what}: got {flag}/luck. Known: " in line


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
    assert refusal(start, capsys, "fit", "--trainer.max_steps=50", code=143) == stopped
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
    line = refusal(start, capsys, "fit", f"--ckpt_path={version(0)}")
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
    line = refusal(start, capsys, *flags)
    assert "`dirpath` must be a folder without another run's checkpoints: got" in line
