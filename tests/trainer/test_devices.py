"""GPUs that a machine lacks: one line, before the trainer is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdrl_lightning.__main__ import main
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.trainer.checks.devices import check_devices


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("devices", [[3], "3,", 3, "3", [0, 2], "0,2"])
@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "auto"])
def test_a_gpu_that_is_not_there(accelerator: str, devices: object) -> None:
    words = r"`devices` must name GPUs of this machine, which has 2 \(0 to 1\): got "
    with pytest.raises(ConfigurationError, match=words):
        check_devices(accelerator, devices)


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("devices", [[1], "1,", 2, "2", "auto", -1, [0, 1], None, "-1"])
def test_gpus_that_are_there(devices: object) -> None:
    check_devices("gpu", devices)
    check_devices("cpu", 64)


@pytest.mark.usefixtures("none")
@pytest.mark.parametrize(
    ("cuda", "why"), [(None, "is built without CUDA"), ("13.0", "finds no NVIDIA driver")]
)
def test_a_machine_without_cuda(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, why: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    for accelerator in ("gpu", "cuda"):
        words = rf"`accelerator` must be one that this machine has: got {accelerator}, but .*{why}"
        with pytest.raises(ConfigurationError, match=words):
            check_devices(accelerator, 1)
    check_devices("auto", "auto")


@pytest.mark.usefixtures("none")
@pytest.mark.parametrize("command", ["fit", "evaluate"])
def test_the_command_line_says_so_in_one_line(
    tmp_path: Path,
    student_folder: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--config=rlad", "--trainer.accelerator=gpu"]
    if command == "evaluate":
        flags.append(f"--models.one={student_folder}")
    with pytest.raises(SystemExit) as error:
        main([command, *flags])
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: `accelerator` must be one that this machine has: got gpu, but ")
