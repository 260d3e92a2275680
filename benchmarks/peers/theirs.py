"""Runs TRL's side: its trainers without changes, timed from outside.

TRL's trainers, hooks and batches are ``Any`` here: TRL has no types.
"""

from __future__ import annotations

import tempfile
from functools import wraps
from importlib import import_module
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from peers.job import Clock, Job, given_completions, model_folder, prompts, reward_of

# TRL imports any installed version of vLLM, which this comparison does not need.
import_module("trl.import_utils").is_vllm_available = lambda min_version=None: False


class Steps(TrainerCallback):
    """Reports optimizer steps to the clock."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.tokens = 0

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._optimizer = self.clock.part("training")
        self._optimizer.__enter__()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._optimizer.__exit__(None, None, None)
        self.clock.step_done(self.tokens)
        self.tokens = 0


def timed(clock: Clock, name: str, trainer: Any, method: str) -> None:
    """Add the time of a trainer's method to a part of the clock."""
    inner = getattr(trainer, method)

    @wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        with clock.part(name):
            return inner(*args, **kwargs)

    setattr(trainer, method, outer)


def make(job: Job, folder: str) -> Any:
    """Return the TRL trainer that does the same work."""
    from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

    rows = prompts(job, job.prompts * (job.steps + 1))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": job.micro,
        "gradient_accumulation_steps": job.prompts * job.group // job.micro,
        "max_steps": job.steps + 1,
        "max_completion_length": job.tokens,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": job.precision == "bf16",
        "use_cpu": True,
        "gradient_checkpointing": job.checkpointing,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "temperature": 1.0,
        "seed": job.seed,
    }
    own = {"processing_class": tokenizer, "train_dataset": Dataset.from_list(rows)}
    if job.work == "distillation":
        args = DistillationConfig(**common, beta=1.0)
        teacher = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        return DistillationTrainer(model, teacher, args=args, **own)

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [reward_of(c, a) for c, a in zip(completions, answer, strict=True)]

    # TRL has no teacher here; the reference model is the closest.
    beta = 0.0 if job.work == "grpo" else 0.04
    args = GRPOConfig(**common, num_generations=job.group, beta=beta, loss_type="dapo")
    return GRPOTrainer(model, reward, args=args, **own)


def run(job: Job) -> dict[str, Any]:
    """Train for a few steps, and return the clock's figures."""
    clock, folder = Clock(job), model_folder(job.model)
    trainer, steps = make(job, folder), Steps(clock)
    trainer.add_callback(steps)
    if job.fixed:
        tokenizer, count = trainer.processing_class, job.prompts * job.group
        given = given_completions(job, len(tokenizer), tokenizer.eos_token_id, count)
        # DistillationTrainer's method returns only the ids.
        out = given if job.work == "distillation" else (given, None)
        trainer._generate_single_turn = lambda *_, **__: out
    else:
        timed(clock, "generation", trainer, "_generate_single_turn")
    sampled = trainer._generate_single_turn

    def count(*args: Any, **kwargs: Any) -> Any:
        out = sampled(*args, **kwargs)
        steps.tokens += sum(map(len, out[0] if isinstance(out, tuple) else out))
        return out

    trainer._generate_single_turn = count
    if job.work in ("kdrl", "rlad"):
        inner = trainer._get_per_token_logps_and_entropies

        def logps(model: Any, *args: Any, **kwargs: Any) -> Any:
            if model is not trainer.ref_model:
                return inner(model, *args, **kwargs)
            with clock.part("scoring"):
                return inner(model, *args, **kwargs)

        trainer._get_per_token_logps_and_entropies = logps
    # Forward and backward, without the work before the first micro-batch.
    update, prepare = trainer.training_step, trainer._prepare_inputs

    def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        ready = prepare(inputs)
        trainer._prepare_inputs = lambda _: ready
        with clock.part("training"):
            return update(model, inputs, *args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    return clock.result()
