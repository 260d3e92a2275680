"""Measures memory per process and time per step, for one and two processes, ddp and fsdp2.

Student and teacher have random weights of one shape. The table compares the measured peak with the
calculation of ``docs/scale.md``. ``MALLOC_MMAP_THRESHOLD_`` makes the C library return freed memory
at once; otherwise the process would keep it. The script prints a table, and writes ``scale.json``
and ``scale.md`` into --out. With --lora the student trains adapters of that rank, and the teacher
is their base.

    python benchmarks/scale.py --out docs/scale --width 512 --layers 6
    python benchmarks/scale.py --out docs/scale/lora --width 512 --layers 6 --lora 16
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback

from kdrl_lightning.checkpoints.writer import CheckpointWriter

ROOT = Path(__file__).parents[1]
RUNS = (("auto", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 1))
STEPS = 4
MB = 1 << 20


class Memory(threading.Thread):
    """Samples the private memory of this process (no mapped files) every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = self.now()
        self.start()

    def now(self) -> float:
        """Return the current memory in MB."""
        with open("/proc/self/status") as file:
            line = next(x for x in file if x.startswith("RssAnon"))
        return int(line.split()[1]) / 1024

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.003)


class Measure(Callback):
    """Writes the memory, step times and checkpoint times of a rank.

    The loading time covers all of a resume: checks, student and optimizer moments.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.seconds: list[float] = []
        self.memory: Memory | None = None
        self._last = self.before = 0.0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.memory is None:
            self.memory = Memory()
            self.before = self.memory.now()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        self._last = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        self.seconds.append(time.perf_counter() - self._last)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        assert self.memory is not None
        held = self.memory.peak
        path = self.folder / "saved.ckpt"
        started = time.perf_counter()
        CheckpointWriter().write(trainer, path)
        save = time.perf_counter() - started
        trainer.strategy.barrier()
        started = time.perf_counter()
        connector = trainer._checkpoint_connector
        connector.resume_start(path)
        connector.restore_model()
        connector.restore_optimizers_and_schedulers()
        load = time.perf_counter() - started
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        record = {
            "before": self.before,
            "peak": held,
            "step_seconds": statistics.median(self.seconds[1:]),
            "save_seconds": save,
            "load_seconds": load,
            "saved_mb": sum(p.stat().st_size for p in files) / MB,
        }
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(record))


def make_model(folder: Path, width: int, layers: int) -> int:
    """Write a random Qwen2 with the embedded task's tokenizer; return its number of weights."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from kdrl_lightning.tiny import TinyModel

    tokenizer = AutoTokenizer.from_pretrained(TinyModel("teacher").path())
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def expected(weights: int, layers: int, strategy: str, processes: int, adapters: int) -> float:
    """Return MB per process: the terms of the calculation, in float32.

    The terms are weights, gradients and two moments of the student, and the teacher's weights; all
    are split by fsdp2. ddp's buckets hold a second copy of the gradients. Under fsdp2 the
    transformers engine has a whole copy, and two layers with their gradients are gathered at a
    time. With adapters the base has neither gradients nor moments, and is the teacher, too.
    """
    parts = processes if strategy == "fsdp2" else 1
    trained = adapters or weights
    other = weights  # of the teacher, or of the base of the adapters
    passing = 2 * 4 * (weights + trained) / layers
    extra = {"ddp": 4.0 * trained, "fsdp2": 4.0 * weights + passing}.get(strategy, 0.0)
    return ((16 * trained + 4 * other) / parts + extra) / MB


def adapter_weights(model: Path, rank: int) -> int:
    """Return how many weights adapters of a rank have; 0 for rank 0."""
    if not rank:
        return 0
    from kdrl_lightning import LoRA
    from kdrl_lightning.models.loading import load_causal_lm

    adapted = load_causal_lm(str(model))
    LoRA(rank).inject(adapted, seed=0)
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def run(model: Path, strategy: str, processes: int, rank: int = 0) -> dict[str, Any]:
    """Run a few steps in new processes, and return the measurements."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = {"class_path": "kdrl_lightning.tiny.ColumnAddition", "init_args": {"size": 64}}
        config: dict[str, Any] = {
            "model": {
                "student": str(model),
                "teacher": {"class_path": "LocalTeacher", "init_args": {"model": str(model)}},
                "objective": {"class_path": "KDRL", "init_args": {"teacher_kl_coef": 0.1}},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-6}},
            },
            "data": {
                "train_prompts": prompts,
                "reward": "kdrl_lightning.tiny.addition_reward",
                "rollout": {
                    "prompts_per_rollout": 4,
                    "group_size": 4,
                    "max_tokens": 16,
                },
            },
            "trainer": {
                "accelerator": "cpu",
                "devices": processes,
                "strategy": strategy,
                "max_steps": STEPS,
                "enable_checkpointing": False,
                "logger": False,
                "callbacks": [
                    {"class_path": "CPUThreads"},
                    {"class_path": "benchmarks.scale.Measure", "init_args": {"folder": folder}},
                ],
            },
            "report": {"export": False},
        }
        if rank:
            config["model"]["lora"] = {"rank": rank}
            config["model"]["teacher"] = {"class_path": "AdapterOffTeacher"}
        file = Path(folder) / "run.yaml"
        file.write_text(yaml.safe_dump(config))
        out = subprocess.run(
            [sys.executable, "-m", "kdrl_lightning", "fit", "--config", str(file)],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "MALLOC_MMAP_THRESHOLD_": "65536",
            },
            capture_output=True,
            text=True,
        )
        if out.returncode:
            raise RuntimeError(out.stderr[-2000:])
        ranks = [json.loads(p.read_text()) for p in sorted(Path(folder).glob("rank*.json"))]
    return {
        "strategy": strategy,
        "processes": processes,
        "peak_mb": max(r["peak"] - r["before"] for r in ranks),
        "step_seconds": max(r["step_seconds"] for r in ranks),
        "save_seconds": max(r["save_seconds"] for r in ranks),
        "load_seconds": max(r["load_seconds"] for r in ranks),
        "saved_mb": ranks[0]["saved_mb"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters; 0: all weights")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = make_model(Path(folder), args.width, args.layers)
        adapters = adapter_weights(Path(folder), args.lora)
        records = []
        for strategy, processes in RUNS:
            record = run(Path(folder), strategy, processes, args.lora)
            due = expected(weights, args.layers, strategy, processes, adapters)
            records.append({**record, "expected_mb": due})
            print(records[-1], flush=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, "weights": weights, "adapters": adapters, "runs": records}
    (args.out / "scale.json").write_text(json.dumps(record, indent=1) + "\n")
    lines = [
        "# Memory and time of training: measured and calculated",
        "",
        f"{weights / 1e6:.1f} M weights in student and teacher each, float32; {machine}."
        if not adapters
        else f"{weights / 1e6:.1f} M frozen and {adapters / 1e6:.2f} M adapter weights, float32; "
        f"{machine}.",
        "",
        "| strategy | processes | peak MB per process | calculated | s per step | s to save "
        "| s to load | MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {r['strategy']} | {r['processes']} | {r['peak_mb']:.0f} | {r['expected_mb']:.0f} "
            f"| {r['step_seconds']:.2f} | {r['save_seconds']:.2f} | {r['load_seconds']:.2f} "
            f"| {r['saved_mb']:.0f} |"
            for r in records
        ),
        "",
    ]
    (args.out / "scale.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
