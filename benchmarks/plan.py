"""Compares ``plan`` with measured peaks of real steps, on a CPU.

Each case trains a random model for three rollouts in new processes. torch reports each allocation
of its CPU allocator (its profiler's memory events) after the start of training. It does not report
that something is freed which was there before. The weights that the run holds then are added. Peaks
are those of the third rollout: ddp makes its buckets anew in the second one.

    python benchmarks/plan.py --out docs/plan
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback
from torch.autograd.profiler import record_function

from kdrl_lightning import LocalTeacher

ROOT = Path(__file__).parents[1]
CASES: dict[str, dict[str, Any]] = {
    "one process": {},
    "one process, checkpointing": {"checkpointing": True},
    "one process, LoRA": {"lora": 8},
    "one process, bf16-mixed": {"precision": "bf16-mixed"},
    "ddp, 2 processes": {"strategy": "ddp", "processes": 2},
    "ddp, 2 processes, checkpointing": {"strategy": "ddp", "processes": 2, "checkpointing": True},
    "fsdp2, 2 processes": {"strategy": "fsdp2", "processes": 2},
    "fsdp2, 2 processes, checkpointing": {
        "strategy": "fsdp2",
        "processes": 2,
        "checkpointing": True,
    },
    "fsdp2, 2 processes, LoRA": {"strategy": "fsdp2", "processes": 2, "lora": 8},
}
PROMPTS, GROUP, TOKENS, MICRO = 8, 4, 96, 2
PROMPT = 10  # tokens of the task's prompts
MARK = "phase "
# Phases of a plan by the methods that run them.
METHODS = {
    "score": ("score", "score_teacher", "score_reference"),
    "update": ("training_step", "backward"),
    "step": ("on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step"),
}


class Peaks(Callback):
    """Writes the peak of each phase of the third rollout, in bytes.

    Args:
        folder: where each rank writes a file.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.profiler: Any = None
        self.state = 0
        self.prompt = 0
        self.marked = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.state = held(pl_module)
        self.profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self.profiler.start()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        self.prompt = max(self.prompt, int(batch.prompt_lengths.max()))
        if not self.marked and trainer.global_step == 2:
            self.marked = True
            self._mark(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.profiler.stop()
        peaks = {name: self.state + most for name, most in self._peaks().items()}
        record = {"state": self.state, "prompt": self.prompt, "peaks": peaks}
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(record))

    def _mark(self, trainer: Any, module: Any) -> None:
        for phase, names in METHODS.items():
            for name in names:
                wrap(module, name, phase)
        engine = trainer.datamodule.rollout_engine
        wrap(engine, "generate", "sample")
        wrap(engine, "update_weights", "push")

    def _peaks(self) -> dict[str, int]:
        events = sorted(self.profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
        spans: list[tuple[int, int, str]] = []
        for event in events:
            if event.name().startswith(MARK):
                start = event.start_ns()
                name = event.name().removeprefix(MARK)
                spans.append((start, start + event.duration_ns(), name))
        now, most = 0, {}
        for event in events:
            if event.name() != "[memory]":
                continue
            now += event.nbytes()
            # A step calls the update: the span that began last counts.
            inside = [span for span in spans if span[0] <= event.start_ns() <= span[1]]
            if inside:
                name = max(inside)[2]
                most[name] = max(most.get(name, 0), now)
        return most


def wrap(owner: Any, name: str, phase: str) -> None:
    """Mark the calls of a method."""
    inner = getattr(owner, name)

    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(MARK + phase):
            return inner(*args, **kwargs)

    setattr(owner, name, marked)


def held(module: Any) -> int:
    """Return bytes of weights on this rank before the first step.

    ddp's first buckets are not among them.
    """
    frozen = [m for m in (module.frozen.active, module.frozen.reference) if m is not None]
    models = [module.student, *(m._scorer for m in frozen if isinstance(m, LocalTeacher))]
    tensors = [t for m in models for t in [*m.parameters(), *m.buffers()]]
    parts = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    sizes = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parts}
    return sum(sizes.values())


def make_model(folder: Path, width: int, layers: int, vocabulary: int) -> None:
    """Write a random Qwen3 with the tokenizer of the embedded task."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from kdrl_lightning.tiny.models import make_tokenizer

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        head_dim=32,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def settings(model: str, case: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the configuration of a case."""
    rows = PROMPTS * GROUP // case.get("processes", 1) // MICRO
    config: dict[str, Any] = {
        "model": {
            "student": model,
            "teacher": {"class_path": "LocalTeacher", "init_args": {"model": model}},
            "objective": {"class_path": "KDRL", "init_args": {"teacher_kl_coef": 0.1}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-6}},
            "activation_checkpointing": case.get("checkpointing", False),
        },
        "data": {
            "train_prompts": {
                "class_path": "kdrl_lightning.tiny.ColumnAddition",
                "init_args": {"size": 64},
            },
            "reward": "kdrl_lightning.tiny.addition_reward",
            "rollout": {
                "prompts_per_rollout": PROMPTS,
                "group_size": GROUP,
                "max_tokens": TOKENS,
                # A short completion would otherwise leave more than its share to the others.
                "max_tokens_per_micro_batch": rows * (PROMPT + TOKENS),
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": case.get("processes", 1),
            "strategy": case.get("strategy", "auto"),
            "precision": case.get("precision", "32-true"),
            "accumulate_grad_batches": MICRO,
            "gradient_clip_val": 1.0,
            "max_steps": 3,
            "enable_checkpointing": False,
            "logger": False,
            "callbacks": [
                {"class_path": "CPUThreads"},
                {"class_path": "benchmarks.plan.Peaks", "init_args": {"folder": folder}},
            ],
        },
        "report": {"export": False},
    }
    if "lora" in case:
        config["model"]["lora"] = {"rank": case["lora"]}
        config["model"]["teacher"] = {"class_path": "AdapterOffTeacher"}
    return config


def measured(model: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Run a case in new processes; return the largest peak of each phase over the ranks."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(yaml.safe_dump(settings(str(model), case, folder)))
        out = subprocess.run(
            [sys.executable, "-m", "kdrl_lightning", "fit", "--config", str(file)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if out.returncode:
            raise RuntimeError(out.stderr[-3000:])
        ranks = [json.loads(p.read_text()) for p in sorted(Path(folder).glob("rank*.json"))]
    names = {name for rank in ranks for name in rank["peaks"]}
    peaks = {name: max(rank["peaks"].get(name, 0) for rank in ranks) for name in names}
    return {"peaks": peaks, "prompt": max(r["prompt"] for r in ranks)}


def planned(model: Path, case: dict[str, Any], prompt: int) -> dict[str, float]:
    """Return the bytes of each phase by the plan of the same configuration."""
    from kdrl_lightning.cli.plan import own_flags
    from kdrl_lightning.cli.plan import planned as plan_of

    with tempfile.TemporaryDirectory() as folder:
        config = settings(str(model), case, folder)
        config["trainer"]["callbacks"] = []
        file = Path(folder) / "run.yaml"
        file.write_text(yaml.safe_dump(config))
        words = ["--config", str(file), "--prompt-tokens", str(prompt)]
        own, rest = own_flags().parse_known_args(words)
        return {phase.name: phase.total for phase in plan_of(own, rest).phases}


def compared(model: Path, name: str) -> dict[str, Any]:
    """Return what a case measured, what its plan says, and their ratios."""
    found = measured(model, CASES[name])
    due = planned(model, CASES[name], found["prompt"])
    peaks = found["peaks"]
    ratios = {phase: due[phase] / size for phase, size in peaks.items() if phase in due}
    whole = max(due.values()) / max(peaks.values())
    return {"case": name, "measured": peaks, "planned": due, "ratios": ratios, "ratio": whole}


def table(records: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the comparisons."""
    names = ("sample", "score", "update", "step")
    head = "| case | " + " | ".join(f"{n}: measured, planned MB" for n in names)
    lines = [f"{head} | largest phase: planned / measured |", "| --- " * (len(names) + 2) + "|"]
    for record in records:
        cells = [
            f"{record['measured'].get(n, 0) / 1e6:.1f}, {record['planned'][n] / 1e6:.1f}"
            for n in names
        ]
        lines.append(f"| {record['case']} | {' | '.join(cells)} | {record['ratio']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), args.width, args.layers, args.vocabulary)
        records = []
        for name in args.cases:
            records.append(compared(Path(folder), name))
            print(json.dumps(records[-1]), flush=True)
    machine = f"{platform.machine()}, torch {torch.__version__}"
    print(table(records))
    if args.out:
        shape = {"width": args.width, "layers": args.layers, "vocabulary": args.vocabulary}
        record = {"machine": machine, "model": shape, "cases": records}
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "measured.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
