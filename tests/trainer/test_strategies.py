"""Strategy flags as a user gives them, with Lightning's own launcher and with torchrun."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy, StrategyRegistry
from safetensors.torch import load_file

from helpers.processes import ready
from kdrl_lightning.__main__ import main
from kdrl_lightning.common.distributed import stop_together
from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.trainer.strategies import FSDP2Strategy, refuse_fsdp1, sharding_of

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
# Sharded models run each row whole. In float32 one that runs a prompt once for its group rounds
# otherwise, and Adam divides by what are nearly no gradients: not what is compared here.
UNSHARED = """import sys
from kdrl_lightning.__main__ import main
from kdrl_lightning.models.scorer import Scorer
Scorer._shares = lambda self, *rows: False
main(sys.argv[2:])"""


def command_line(folder: Path, *flags: str, launcher: tuple[str, ...] = ()) -> Any:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if not launcher:
        return ready.run(list(flags), folder, env)
    return subprocess.run(
        [sys.executable, *launcher, "kdrl_lightning", *flags],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


def fit(folder: Path, *flags: str, launcher: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run a short GKD, whose teacher works in every update; return what the run wrote."""
    folder.mkdir()
    out = command_line(
        folder,
        "fit",
        f"--config={ROOT / 'configs/gkd.yaml'}",
        "--trainer.max_steps=2",
        "--data.rollout.prompts_per_rollout=8",
        "--data.val_prompts.size=9",
        *flags,
        launcher=launcher,
    )
    assert out.returncode == 0, out.stderr[-4000:]
    run = folder / "runs/gkd/version_0"
    with open(run / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("loss/total")]
    return {
        "summary": json.loads((run / "summary.json").read_text()),
        "rows": rows,
        "weights": load_file(run / "student/model.safetensors"),
        "checkpoint": next((run / "checkpoints").glob("*.ckpt")),
    }


def test_fsdp2_by_flag_and_under_torchrun_is_the_run_of_one_process(tmp_path: Path) -> None:
    two = ("--trainer.devices=2",)
    one = fit(tmp_path / "one", launcher=("-c", UNSHARED))
    flag = fit(tmp_path / "flag", "--trainer.strategy=fsdp2", *two)
    full = fit(tmp_path / "full", "--trainer.strategy=fsdp2_full", *two, launcher=TORCHRUN)
    for run in (flag, full):
        for name in ("student_accuracy_before", "student_accuracy_after", "teacher_accuracy"):
            assert run["summary"][name] == one["summary"][name], name
        assert one["summary"]["teacher_accuracy"] > 0.9
        for ours, theirs in zip(one["rows"], run["rows"], strict=True):
            for name in ("loss/total", "policy/grad_norm", "kd/reverse_kl", "reward/mean"):
                assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-4), name
        for name, tensor in one["weights"].items():
            torch.testing.assert_close(run["weights"][name], tensor, atol=1e-5, rtol=1e-5)
    assert (flag["checkpoint"] / ".metadata").is_file()
    assert full["checkpoint"].is_file()
    saved = torch.load(full["checkpoint"], weights_only=True)["state_dict"]
    names = {name.removeprefix("student.model.") for name in saved}
    assert set(one["weights"]) <= names
    assert not [name for name in saved if "teacher" in name]


@pytest.mark.parametrize("flag", ["fsdp", "fsdp_cpu_offload", "FSDPStrategy"])
def test_fsdp1_stops_at_once_with_one_line_that_names_fsdp2(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={ROOT / 'configs/gkd.yaml'}", f"--trainer.strategy={flag}"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: `strategy` must be fsdp2 for sharding: got {flag}, which")
    assert line.endswith("Use `--trainer.strategy fsdp2`.")


def test_an_fsdp1_object_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"`strategy` must be fsdp2 .*: got FSDPStrategy"):
        refuse_fsdp1(FSDPStrategy())
    refuse_fsdp1("auto")
    refuse_fsdp1(FSDP2Strategy())


def test_names_are_registered_with_their_checkpoints() -> None:
    assert StrategyRegistry.get("fsdp2")._save_distributed_checkpoint
    assert not StrategyRegistry.get("fsdp2_full")._save_distributed_checkpoint


def trainer(tensor_parallel: int = 1, inference_mode: bool = False) -> Any:
    mesh = {
        "data_parallel": SimpleNamespace(size=lambda: 2),
        "tensor_parallel": SimpleNamespace(size=lambda: tensor_parallel),
    }
    strategy = FSDP2Strategy()
    strategy._device_mesh = mesh  # type: ignore[assignment]
    return SimpleNamespace(
        strategy=strategy,
        precision="bf16-mixed",
        validate_loop=SimpleNamespace(inference_mode=inference_mode),
    )


def test_what_a_sharding_cannot_be() -> None:
    found = sharding_of(trainer())
    assert found is not None and found.param_dtype == torch.bfloat16
    with pytest.raises(ConfigurationError, match="`tensor_parallel_size` must be 1: got 2"):
        sharding_of(trainer(tensor_parallel=2))
    with pytest.raises(ConfigurationError, match="`inference_mode` must be false under fsdp2"):
        sharding_of(trainer(inference_mode=True))
    assert sharding_of(None) is None
    assert sharding_of(SimpleNamespace(strategy=SingleDeviceStrategy())) is None


def test_any_error_on_one_rank_is_told_to_the_others() -> None:
    told: list[float] = []

    def reduce(value: torch.Tensor, operation: str) -> torch.Tensor:
        told.append(float(value))
        return value + 1  # another rank failed

    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        stop_together(fail, reduce)
    with pytest.raises(TrainingStopped, match="another process had to stop"):
        stop_together(lambda: None, reduce)
    assert told == [1.0, 0.0]
