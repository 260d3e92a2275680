"""GPUs that a machine lacks are refused in one line, before the trainer is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.short_runs import make_data, make_module, make_trainer
from kdrl_lightning import GRPO
from kdrl_lightning.__main__ import main
from kdrl_lightning.cli.main import KDRLCLI
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.trainer.checks.devices import check_devices, check_memory


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


@pytest.mark.usefixtures("two")
def test_a_card_too_small_for_the_student_is_refused_before_weights_are_loaded(
    student_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda", 0)
    numbers = sum(p.numel() for p in load_causal_lm(student_folder).parameters())
    check_memory(student_folder, torch.device("cpu"), 1, False)

    def refused(memory: float, ranks: int, adapters: bool, words: str) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, int(memory)))
        check_memory(student_folder, gpu, 4 * ranks, adapters)
        with pytest.raises(ConfigurationError, match=words):
            check_memory(student_folder, gpu, ranks, adapters)

    both = f"whose weights and gradients alone take {8 * numbers / 1e9:.3g} GB on each, and a GPU"
    refused(7.9 * numbers, 1, False, rf"{both} of .* GB. Set `strategy: fsdp2` or `model.lora`; ")
    refused(3.9 * numbers, 2, False, r"Use more GPUs or `model.lora`; `python -m kdrl_lightning pl")
    refused(3.9 * numbers, 1, True, r"whose weights alone take .* Set `strategy: fsdp2`; `python")
    refused(1.9 * numbers, 2, True, r"whose weights alone take .* Use more GPUs; `python -m")


def test_a_run_looks_at_the_card_before_it_loads(
    tmp_path: Path, student_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int, bool]] = []

    def check(path: str, device: torch.device, ranks: int, adapters: bool) -> None:
        asked.append((path, ranks, adapters))
        raise ConfigurationError("too small")

    monkeypatch.setattr("kdrl_lightning.module.check_memory", check)
    module = make_module(student_folder, None, GRPO())
    monkeypatch.setattr(type(module), "configure_model", lambda self: pytest.fail("loaded"))
    with pytest.raises(ConfigurationError, match="too small"):
        make_trainer(tmp_path).fit(module, datamodule=make_data())
    assert asked == [(student_folder, 1, False)]


def test_a_full_card_ends_the_run_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: object) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")
        except RuntimeError as error:
            raise ValueError("a step failed") from error

    monkeypatch.setattr(KDRLCLI, "run", full)
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", "rlad"])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: a GPU must have room for the run: got CUDA out of memory. Tri")
    assert "plan` with the same flags: it says which phase needs most" in line
