"""Compares ``plan`` with measured peaks of real steps, on a CPU.

Each case trains a random model for three rollouts in new processes, in which a preloaded library
counts what torch's CPU allocator holds (``counted_memory.py``; needs gcc). Peaks are those of the
third rollout, because ddp rebuilds its buckets in the second one.

    python benchmarks/plan.py --out docs/plan
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.counted_memory import Peaks, preloaded  # noqa: E402


@dataclass(frozen=True)
class Shape:
    """A random Qwen3 with heads of 32; ``shared`` query heads share keys and values."""

    width: int = 256
    layers: int = 4
    vocabulary: int = 8192
    shared: int = 2
    tied: bool = False


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
    # Other shapes: width, layers, vocabulary, query heads per key, tied or not.
    "tied, GQA 3, V 20,000, reference KL": {
        "student": Shape(192, 3, 20_000, shared=3, tied=True),
        "objective": {"class_path": "GRPO", "init_args": {"ref_kl_coef": 0.1}},
        "teacher": None,
    },
    "a larger teacher, full vocabulary": {
        "student": Shape(128, 2, 12_000, shared=1, tied=True),
        "teacher_model": Shape(384, 4, 12_000, shared=4),
        "objective": {
            "class_path": "KDRL",
            "init_args": {"teacher_kl_coef": 0.1, "kl_estimator": "full_vocabulary"},
        },
    },
    "self-teacher, moving average": {
        "student": Shape(320, 2, 4_000, shared=5),
        "teacher": {
            "class_path": "SelfTeacher",
            "init_args": {"weights": {"class_path": "MovingAverage"}},
        },
    },
    "self-teacher, trust region, checkpointing": {
        "student": Shape(256, 6, 3_000, shared=2, tied=True),
        "checkpointing": True,
        "teacher": {
            "class_path": "SelfTeacher",
            "init_args": {
                "weights": {"class_path": "TrustRegion", "init_args": {"student_weight": 0.5}}
            },
        },
    },
    "a teacher with a longer prompt": {
        "student": Shape(192, 4, 1_000, shared=2),
        "teacher_model": Shape(256, 4, 1_000, shared=2),
        "shown": 300,
    },
    # Shapes that were measured only after the plan was written.
    "ddp, 2 processes: tied, GQA 4, V 15,000, LoRA": {
        "strategy": "ddp",
        "processes": 2,
        "lora": 4,
        "student": Shape(384, 3, 15_000, shared=4, tied=True),
        "group": 8,
    },
    "fsdp2, 2 processes: 7 layers, V 3,500, groups of 2, checkpointing": {
        "strategy": "fsdp2",
        "processes": 2,
        "checkpointing": True,
        "student": Shape(160, 7, 3_500, shared=5),
        "group": 2,
    },
    "fsdp2, 2 processes, larger teacher, bf16-mixed": {
        "strategy": "fsdp2",
        "processes": 2,
        "precision": "bf16-mixed",
        "student": Shape(192, 3, 6_000, shared=3),
        "teacher_model": Shape(320, 4, 6_000, shared=5),
    },
    "larger offloaded teacher, top 16, groups of 6, small micro-batches": {
        "student": Shape(224, 3, 9_000, shared=7),
        "teacher_model": Shape(352, 5, 9_000, shared=11),
        "teacher_init": {"offload": True},
        "objective": {
            "class_path": "KDRL",
            "init_args": {"teacher_kl_coef": 0.1, "kl_estimator": "top_k", "kd_top_k": 16},
        },
        "group": 6,
        "micro_batches": 24,
        "rollout": {"max_tokens_per_micro_batch": 300},
    },
    "fsdp2, 2 processes: tied, top 8, groups of 6, bf16-mixed": {
        "strategy": "fsdp2",
        "processes": 2,
        "precision": "bf16-mixed",
        "student": Shape(288, 5, 11_000, shared=3, tied=True),
        "objective": {
            "class_path": "KDRL",
            "init_args": {"teacher_kl_coef": 0.1, "kl_estimator": "top_k", "kd_top_k": 8},
        },
        "group": 6,
    },
    "fsdp2, 2 processes: LoRA, checkpointing, bf16-mixed": {
        "strategy": "fsdp2",
        "processes": 2,
        "precision": "bf16-mixed",
        "lora": 16,
        "checkpointing": True,
        "student": Shape(384, 4, 10_000, shared=4),
    },
    "completions of 300 tokens at temperature 0.7": {
        "student": Shape(192, 3, 12_000, shared=2),
        "micro_batches": 8,
        "rollout": {"max_tokens": 300, "max_tokens_per_micro_batch": 1240, "temperature": 0.7},
    },
}
PROMPTS, GROUP, TOKENS, MICRO = 8, 4, 96, 2
PROMPT = 10  # tokens of the task's prompts
# Phases of a plan by the methods that run them.
METHODS = {
    "score": ("score", "score_teacher", "score_reference"),
    "update": ("training_step", "backward"),
    "step": ("on_before_optimizer_step", "configure_gradient_clipping"),
}


class Measured(Callback):
    """Writes the peak of each phase of the third rollout, in bytes.

    Args:
        folder: where each rank writes a file.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.peaks = Peaks()
        self.prompt = self.elsewhere = 0
        self.marked = False

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int
    ) -> None:
        self.prompt = max(self.prompt, int(batch.prompt_lengths.max()))
        if not self.marked and trainer.global_step == 2:
            self.marked = True
            for phase, names in METHODS.items():
                for name in names:
                    self.peaks.watch(pl_module, name, phase)
            self._watch_optimizer(pl_module)
            engine = trainer.datamodule.rollout_engine
            self.peaks.watch(engine, "generate", "sample")
            self.peaks.watch(engine, "update_weights", "push")
            self.elsewhere = self.peaks.elsewhere()

    def _watch_optimizer(self, module: Any) -> None:
        """Count the optimizer as a step, but not the last micro-batch, which runs inside of it."""
        inner = self.peaks.watched(module.optimizer_step, "step")

        def step(epoch: int, index: int, optimizer: Any, closure: Any) -> None:
            inner(epoch, index, optimizer, self.peaks.watched(closure, "update"))

        module.optimizer_step = step

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        # Weights of a file that is mapped into memory are outside of torch's allocator.
        peaks = {name: size + self.elsewhere for name, size in self.peaks.most.items()}
        record = {"prompt": self.prompt, "peaks": peaks}
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(record))


def make_model(folder: Path, shape: Shape) -> str:
    """Write a random Qwen3 with the tokenizer of the embedded task; return its folder."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from kdrl_lightning.tiny.models import make_tokenizer

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    heads = shape.width // 32
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=3 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // shape.shared,
        head_dim=32,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=shape.tied,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def teacher_of(case: dict[str, Any], model: str) -> dict[str, Any] | None:
    """Return the settings of a case's teacher."""
    if "teacher" in case:
        return dict(case["teacher"]) if case["teacher"] else None
    given = {"model": model, **case.get("teacher_init", {})}
    local = {"class_path": "LocalTeacher", "init_args": given}
    if "shown" not in case:
        return local
    text = "1" * case["shown"]  # a token a character
    prompt = {
        "context": {"class_path": "FixedContext", "init_args": {"text": text}},
        "template": "{context}{prompt}",
        "max_tokens": case["shown"] + PROMPT,
    }
    return {"class_path": "PromptedTeacher", "init_args": {"teacher": local, "prompt": prompt}}


def settings(models: tuple[str, str], case: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the configuration of a case with a student and a teacher."""
    model, other = models
    group = case.get("group", GROUP)
    rows = PROMPTS * group // case.get("processes", 1) // MICRO
    config: dict[str, Any] = {
        "model": {
            "student": model,
            "teacher": teacher_of(case, other),
            "objective": case.get(
                "objective", {"class_path": "KDRL", "init_args": {"teacher_kl_coef": 0.1}}
            ),
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
                "group_size": group,
                "max_tokens": TOKENS,
                # Otherwise a short completion would leave room for more rows in a micro-batch.
                "max_tokens_per_micro_batch": rows * (PROMPT + TOKENS),
                **case.get("rollout", {}),
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": case.get("processes", 1),
            "strategy": case.get("strategy", "auto"),
            "precision": case.get("precision", "32-true"),
            "accumulate_grad_batches": case.get("micro_batches", MICRO),
            "gradient_clip_val": 1.0,
            "max_steps": 3,
            "enable_checkpointing": False,
            "logger": False,
            "callbacks": [
                {"class_path": "CPUThreads"},
                {"class_path": "benchmarks.plan.Measured", "init_args": {"folder": folder}},
            ],
        },
        "report": {"export": False},
    }
    if "lora" in case:
        config["model"]["lora"] = {"rank": case["lora"]}
        config["model"]["teacher"] = {"class_path": "AdapterOffTeacher"}
    return config


def measured(models: tuple[str, str], case: dict[str, Any]) -> dict[str, Any]:
    """Run a case in new processes; return the largest peak of each phase over the ranks."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(yaml.safe_dump(settings(models, case, folder)))
        out = subprocess.run(
            [sys.executable, "-m", "kdrl_lightning", "fit", "--config", str(file)],
            cwd=folder,
            env={
                **os.environ,
                **preloaded(Path(folder)),
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            text=True,
        )
        if out.returncode:
            raise RuntimeError(out.stderr[-3000:])
        ranks = [json.loads(p.read_text()) for p in sorted(Path(folder).glob("rank*.json"))]
    names = {name for rank in ranks for name in rank["peaks"]}
    peaks = {name: max(rank["peaks"].get(name, 0) for rank in ranks) for name in names}
    return {"peaks": peaks, "prompt": max(r["prompt"] for r in ranks)}


def planned(models: tuple[str, str], case: dict[str, Any], prompt: int) -> dict[str, float]:
    """Return the bytes of each phase by the plan of the same configuration."""
    from kdrl_lightning.cli.plan import plan_flags
    from kdrl_lightning.cli.plan import planned as plan_of

    with tempfile.TemporaryDirectory() as folder:
        config = settings(models, case, folder)
        config["trainer"]["callbacks"] = []
        file = Path(folder) / "run.yaml"
        file.write_text(yaml.safe_dump(config))
        words = ["--config", str(file), "--prompt-tokens", str(prompt)]
        flags, rest = plan_flags().parse_known_args(words)
        return {phase.name: phase.total for phase in plan_of(flags, rest).phases}


def compared(name: str) -> dict[str, Any]:
    """Return what a case measured, what its plan says, and their ratios."""
    case = CASES[name]
    shape = case.get("student", Shape())
    with tempfile.TemporaryDirectory() as folder:
        student = make_model(Path(folder) / "student", shape)
        larger = case.get("teacher_model")
        models = student, make_model(Path(folder) / "teacher", larger) if larger else student
        found = measured(models, case)
        due = planned(models, case, found["prompt"])
    peaks = found["peaks"]
    ratios = {phase: due[phase] / size for phase, size in peaks.items() if phase in due}
    whole = max(due.values()) / max(peaks.values())
    known = {"measured": peaks, "planned": due, "ratios": ratios, "ratio": whole}
    return {"case": name, "student": asdict(shape), **known}


def table(records: list[dict[str, Any]]) -> str:
    """Return a Markdown table of the comparisons: MB measured and planned, by phase."""
    names = ("sample", "score", "update", "step", "push")
    head = f"| case | {' | '.join(names)} | planned / measured, furthest |"
    lines = [head, "| --- " * (len(names) + 2) + "|"]
    for record in records:
        cells = [
            f"{record['measured'].get(n, 0) / 1e6:.1f}, {record['planned'][n] / 1e6:.1f}"
            for n in names
        ]
        furthest = max(record["ratios"].values(), key=lambda ratio: abs(math.log(ratio)))
        lines.append(f"| {record['case']} | {' | '.join(cells)} | {furthest:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    args = parser.parse_args()
    file = None if args.out is None else args.out / "measured.json"
    old = json.loads(file.read_text())["cases"] if file is not None and file.is_file() else []
    found = {record["case"]: record for record in old}
    for name in args.cases:
        found[name] = compared(name)
        print(json.dumps(found[name]), flush=True)
        if file is not None:
            write(file, [found[name] for name in CASES if name in found])
    print(table([found[name] for name in CASES if name in found]))


def write(file: Path, records: list[dict[str, Any]]) -> None:
    """Write the comparisons, and on which machine they were made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()}, torch {torch.__version__}"
    file.write_text(json.dumps({"machine": machine, "cases": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
