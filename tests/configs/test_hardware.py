"""Hardware overlays work with any method, and the launchers of docs/scale.md start runs."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.ports import free_port
from kdrl_lightning.cli.layered_yaml import load_with_base
from kdrl_lightning.cli.main import KDRLCLI

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs/hardware"
PAGE = (ROOT / "docs/scale.md").read_text()
OVERLAYS = [
    ["gpu1"],
    ["gpu1_vllm"],
    ["node8"],
    ["node8", "nodes"],
    ["node8_vllm"],
    ["node8_server"],
]
# No machine with GPUs is available: the rest is as there.
HERE = ["--trainer.accelerator=cpu", "--trainer.devices=2"]
SMALL = [
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=2",
    "--data.rollout.prompts_per_rollout=4",
    "--data.val_prompts=null",
    "--data.rollout.minibatches_per_rollout=1",
    "--report.export=false",
]


def test_every_overlay_is_tried_and_documented() -> None:
    assert {p.stem for p in FOLDER.glob("*.yaml")} == {name for names in OVERLAYS for name in names}
    for path in FOLDER.iterdir():
        assert f"configs/hardware/{path.name}" in PAGE


@pytest.mark.parametrize("names", OVERLAYS, ids="+".join)
def test_an_overlay_changes_the_hardware_and_not_the_method(names: list[str]) -> None:
    method = ROOT / "configs/kdrl_annealing.yaml"
    flags = list(HERE)
    if "vllm" in names[0]:
        if importlib.util.find_spec("vllm") is None:
            pytest.skip("vLLM is not installed")
        flags.append("--data.rollout_engine.sleep=false")  # needs a GPU
    overlays = [f"--config={FOLDER / name}.yaml" for name in names]
    cli = KDRLCLI.run([f"--config={method}", *overlays, *flags], instantiate_only=True)
    plain = load_with_base(method.read_text(), str(method))
    assert cli.trainer.precision == "bf16-mixed"
    assert [c.class_path.split(".")[-1] for c in cli.config.trainer.callbacks] == [
        c["class_path"] for c in plain["trainer"]["callbacks"]
    ]
    assert cli.model.objective.coefficient("teacher_kl_coef") == 0.3
    assert cli.model.activation_checkpointing
    if "gpu1" not in names[0]:
        assert type(cli.trainer.strategy).__name__ == "FSDP2Strategy"
        assert cli.config.checkpoint.asynchronous
    assert cli.trainer.num_nodes == (2 if "nodes" in names else 1)
    engine = {
        "gpu1_vllm": "VLLMEngine",
        "node8_vllm": "VLLMEngine",
        "node8_server": "VLLMServerEngine",
    }
    wanted = engine.get(names[0], "TransformersEngine")
    assert type(cli.datamodule.rollout_engine).__name__ == wanted


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PYTEST_"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def trained(folder: Path) -> list[dict[str, str]]:
    """Return the rows of the only run in a folder."""
    (file,) = folder.glob("runs/*/version_*/metrics.csv")
    with file.open() as lines:
        return [row for row in csv.DictReader(lines) if row.get("loss/total")]


def test_the_torchrun_line_of_the_page_starts_two_nodes(tmp_path: Path) -> None:
    (line,) = re.findall(r"^torchrun .*\\\n.*$", PAGE, re.M)
    for there, here in {
        "--nnodes 4": "--nnodes 2",
        "--nproc_per_node 8": "--nproc_per_node 1",
        "HOST:29500": f"127.0.0.1:{free_port()}",
        "my.yaml": str(ROOT / "configs/kdrl.yaml"),
        "configs/hardware": str(FOLDER),
        "--trainer.num_nodes 4": "--trainer.num_nodes 2",
    }.items():
        assert there in line
        line = line.replace(there, here)
    words = shlex.split(line.replace("\\\n", " "))
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    nodes = [
        subprocess.Popen(
            [*command, *SMALL, "--trainer.devices=1"],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert len(trained(tmp_path)) == 2
    (checkpoint,) = tmp_path.glob("runs/kdrl/version_0/checkpoints/step=*.ckpt")
    assert len(list(checkpoint.glob("*.distcp"))) == 2  # each process its part


SRUN = """#!/usr/bin/env bash
# Two tasks on one node, as SLURM starts them; SIGTERM to all of them after the first checkpoint.
export SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 SLURM_NNODES=1 SLURM_NODEID=0 SLURM_NODELIST=127.0.0.1
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks[$task]=$!; done
until ls runs/*/*/checkpoints/step=* > /dev/null 2>&1; do
    kill -0 "${tasks[@]}" || exit 1
    sleep 0.1
done
kill -TERM "${tasks[@]}"
code=0
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit $code
"""


def test_a_job_of_slurm_whose_time_is_up_saves_and_is_queued_again(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "srun": SRUN,
        "scontrol": f"#!/bin/sh\necho $@ >> {tmp_path}/queued\n",
        "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    slurm = {"SLURM_JOB_ID": "4217", "SLURM_JOB_NAME": "kdrl", "SLURM_JOB_NUM_NODES": "1"}
    own = environment(**slurm)
    flags = [*SMALL, *HERE, "--trainer.max_steps=400"]
    out = subprocess.run(
        ["bash", "configs/hardware/slurm.sh", "configs/kdrl.yaml", *flags],
        cwd=tmp_path,
        env={**own, "PATH": f"{tools}:{own['PATH']}"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert out.returncode == 143, out.stderr[-3000:]
    assert "stopped by SIGTERM after step" in out.stderr
    assert (tmp_path / "queued").read_text() == "requeue 4217\n"
    newest = max(tmp_path.glob("runs/kdrl/version_0/checkpoints/step=*.ckpt"))
    assert len(list(newest.glob("*.distcp"))) == 2  # each process its part
