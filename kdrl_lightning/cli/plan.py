"""Runs ``python -m kdrl_lightning plan``: says whether a run fits its GPUs, without using them."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from jsonargparse import Namespace

from kdrl_lightning.cli.main import KDRLCLI
from kdrl_lightning.cli.parser import OneLineParser
from kdrl_lightning.common.untyped import Value
from kdrl_lightning.errors import ConfigurationError, require_between, require_count
from kdrl_lightning.hardware.planning.cards import CARDS, Card, bytes_of, card_named
from kdrl_lightning.hardware.planning.job import Job, Strategy, sampler_of
from kdrl_lightning.hardware.planning.planner import Plan
from kdrl_lightning.hardware.planning.planner import plan as plan_of
from kdrl_lightning.hardware.planning.report import report
from kdrl_lightning.hardware.planning.shapes import config_of
from kdrl_lightning.models.loading import model_path
from kdrl_lightning.module import KDRLModule
from kdrl_lightning.rollout.settings import RolloutSettings

LONGEST_PROMPT = 1024
DOES_NOT_FIT = 1


class PlanCLI(KDRLCLI):
    """Parses a configuration of ``fit`` without building its objects."""

    def instantiate_classes(self) -> None:
        """Build nothing, because trainer and engine may need GPUs that are not here."""


class OneLine(argparse.ArgumentParser):
    """Raises a ``ConfigurationError`` instead of printing usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise a one-line error.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(
            f"the flags of `plan` must be valid: got {message}. See `python -m kdrl_lightning plan "
            "--help`."
        )


def plan(args: Sequence[str]) -> None:
    """Print the plan of a configuration; exit with 1 if the run does not fit.

    Args:
        args: the command line after ``plan``.

    Raises:
        ConfigurationError: a flag or a setting is wrong.
        SystemExit: with 1, if the run does not fit.
    """
    flags, rest = plan_flags().parse_known_args(list(args))
    made = planned(flags, rest)
    print(report(made))
    if flags.output:
        Path(flags.output).write_text(json.dumps(made.as_dict(), indent=1) + "\n")
    if not made.fits:
        raise SystemExit(DOES_NOT_FIT)


def plan_flags() -> argparse.ArgumentParser:
    """Return the parser of the flags that ``plan`` has in addition to those of ``fit``."""
    parser = OneLine(
        prog="python -m kdrl_lightning plan",
        description="Say whether a run fits its GPUs, from the config.json of its models alone. It "
        "also takes --config and all flags of `fit`. Exit code: 0 if it fits, 1 if not, 2 for a "
        "mistake.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--gpus", type=int, help="number of GPUs; default: the trainer's devices times its nodes")
    add("--gpu-memory", help="memory of a GPU, such as 80GB; default: that of --card")
    add("--card", help=f"name of the GPU, for memory and time: {', '.join(c.name for c in CARDS)}")
    add(
        "--prompt-tokens",
        type=int,
        help=f"longest prompt; default: data.max_prompt_tokens, else {LONGEST_PROMPT}",
    )
    add(
        "--completion-tokens",
        type=int,
        help="mean completion, for the time; default: half of data.rollout.max_tokens",
    )
    add("--teacher-prompt-tokens", type=int, help="longest prompt that the teacher reads")
    add(
        "--teacher-tokens",
        type=float,
        help="for a teacher with another tokenizer: its tokens per token of the student",
    )
    add(
        "--model-config",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="config.json of a model that is not on this machine; repeat it for each model",
    )
    add("--output", metavar="FILE", help="write the plan to a JSON file")
    return parser


def planned(flags: argparse.Namespace, rest: Sequence[str]) -> Plan:
    """Return the plan for a command line.

    Args:
        flags: parsed flags of ``plan``.
        rest: the other words: flags of ``fit``, with the configuration.
    """
    card = card_named(flags.card) if flags.card else None
    memory = bytes_of(flags.gpu_memory) if flags.gpu_memory else card.memory if card else None
    for name, value in (
        ("--gpus", flags.gpus),
        ("--prompt-tokens", flags.prompt_tokens),
        ("--completion-tokens", flags.completion_tokens),
        ("--teacher-prompt-tokens", flags.teacher_prompt_tokens),
    ):
        if value is not None:
            require_count(name, value, 1, float("inf"))
    if flags.teacher_tokens is not None:
        require_between("--teacher-tokens", flags.teacher_tokens, 0.01, 100.0)
    if flags.gpus and not any(word.startswith("--trainer.devices") for word in rest):
        rest = [*rest, f"--trainer.devices={flags.gpus}"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
        cli = PlanCLI.run(rest, instantiate_only=True)
    job, module = job_of(cli.config, flags), module_of(cli)
    job = within_context(job, module)
    cards: tuple[Card, ...] = (card,) if card else CARDS if job.on_gpu else ()
    return plan_of(module, job, memory, cards)


def within_context(job: Job, module: KDRLModule) -> Job:
    """Return the job with its longest prompt cut so that a completion fits the context."""
    config = config_of(model_path(module.student_source), job.model_configs).get_text_config()
    context = getattr(config, "max_position_embeddings", None) or job.longest
    longest = max(1, min(job.longest_prompt, context - job.rollout.max_tokens))
    return replace(job, longest_prompt=longest)


def module_of(cli: KDRLCLI) -> KDRLModule:
    """Return the module of a parsed configuration, without loading its models."""
    alone = OneLineParser()  # the parser of `fit` would build data and trainer, too
    alone.add_lightning_class_args(KDRLModule, "model")
    only = Namespace(model=cli.config.model)  # type: ignore[no-untyped-call]
    module = alone.instantiate_classes(only).model
    assert isinstance(module, KDRLModule)
    return module


def job_of(config: Namespace, flags: argparse.Namespace) -> Job:
    """Return the settings of a parsed configuration that a plan needs."""
    trainer, data = config.trainer, config.data
    ranks = flags.gpus or _devices(trainer.devices) * int(trainer.num_nodes or 1)
    on_gpu = bool(flags.gpus or flags.gpu_memory or flags.card)
    on_gpu |= trainer.accelerator in ("gpu", "cuda")
    return Job(
        rollout=RolloutSettings(**data.rollout.as_dict()),
        sampler=sampler_of(data.rollout_engine, on_gpu),
        ranks=ranks,
        strategy=strategy_of(trainer.strategy, ranks),
        precision=str(trainer.precision or "32-true"),
        on_gpu=on_gpu,
        accumulate=trainer.accumulate_grad_batches,
        clips=bool(trainer.gradient_clip_val),
        reduces_each=reduces_each(trainer.strategy),
        others=data.teacher_completions.count,
        longest_prompt=flags.prompt_tokens or data.max_prompt_tokens or LONGEST_PROMPT,
        mean_completion=flags.completion_tokens,
        kept_checkpoints=max(1, config.checkpoint.keep_last + config.checkpoint.save_top_k),
        teacher_prompt=flags.teacher_prompt_tokens,
        teacher_tokens=flags.teacher_tokens,
        model_configs=dict(_named(text) for text in flags.model_config),
    )


def strategy_of(given: Value, ranks: int) -> Strategy:
    """Return the strategy to plan for: ``single``, ``ddp`` or ``fsdp2``.

    Args:
        given: the trainer's ``strategy``.
        ranks: number of GPUs or processes.

    Raises:
        ConfigurationError: we cannot plan this strategy.
    """
    name = str(getattr(given, "class_path", given)).rsplit(".", 1)[-1].lower()
    if "fsdp2" in name:
        return "fsdp2"
    if name.startswith("ddp") or (name == "auto" and ranks > 1):
        return "ddp" if ranks > 1 else "single"
    if name in ("auto", "singledevicestrategy"):
        return "single"
    raise ConfigurationError(
        f"`strategy` must be auto, ddp or fsdp2 for a plan: got {given}. Plan with one of them."
    )


def reduces_each(given: Value) -> bool:
    """Return whether a configured strategy reduces gradients after every micro-batch."""
    settings = dict(getattr(given, "init_args", None) or {})
    return bool(settings.get("reduce_each_micro_batch", False))


def _devices(given: Value) -> int:
    """Return the number of devices; ``auto`` and -1 count as one, because we look at no GPU."""
    if isinstance(given, list | tuple):
        return len(given)
    text = str(given)
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    return int(text) if text.isdigit() and int(text) > 0 else 1


def _named(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise ConfigurationError(
            f"`--model-config` must be NAME=FILE: got {text}. Write for example "
            "Qwen/Qwen3-8B=config.json."
        )
    return name, file
