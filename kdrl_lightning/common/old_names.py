"""Former module names, so that imports and class paths written with them keep working."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "kdrl_lightning"
MOVED = {
    "advantages": "losses.advantages",
    "architectures": "models.architectures",
    "cache": "models.folder_cache",
    "caches": "models.prompt_cache",
    "callbacks.adaptive_entropy": "callbacks.schedules.adaptive_entropy",
    "callbacks.end_of_run": "trainer.end_of_run",
    "callbacks.kl_annealing": "callbacks.schedules.coefficient_schedule",
    "callbacks.run_folder": "trainer.run_folder",
    "callbacks.schedule": "callbacks.schedules.coefficient_schedule",
    "callbacks.stop_signals": "trainer.stop_signals",
    "callbacks.weight_sync": "callbacks.weight_sync_check",
    "checks": "trainer.checks.steps",
    "compatibility": "teachers.tokenizers",
    "config_base": "cli.layered_yaml",
    "distributed": "common.distributed",
    "end_tokens": "models.end_tokens",
    "engines.shared_heads": "engines.grouped_query_attention",
    "engines.vllm.classes": "engines.vllm.transformers_classes",
    "evaluate": "cli.evaluate",
    "export": "cli.export",
    "gguf": "models.gguf",
    "integrity": "checkpoints.integrity",
    "lora": "models.lora",
    "losses.chosen": "losses.head.chunked_logprobs",
    "losses.chunk_math": "losses.head.chunk_math",
    "losses.chunks": "losses.teacher_chunks",
    "losses.compiled": "losses.head.compiled",
    "losses.head.logprobs_backward": "losses.head.chunked_logprobs",
    "losses.head_products": "losses.head.head_products",
    "losses.importance": "losses.corrections",
    "losses.logprobs_backward": "losses.head.chunked_logprobs",
    "losses.policy": "losses.ratios",
    "merging": "models.passes.shared_prompts",
    "metrics.bootstrap": "evaluation.bootstrap",
    "metrics.evaluation": "evaluation.metric",
    "metrics.majority": "evaluation.majority",
    "metrics.pass_at_k": "evaluation.pass_at_k",
    "models.architectures.reading": "models.architectures.load_errors",
    "models.shared_prompts": "models.passes.shared_prompts",
    "nonfinite": "metrics.nonfinite",
    "objectives.advantage_rules": "objectives.advantages",
    "objectives.distill_terms": "objectives.divergences",
    "objectives.mixtures": "objectives.methods.mixtures",
    "parser": "cli.parser",
    "plots": "callbacks.reports.plots",
    "prompts.column_types": "prompts.columns.column_types",
    "prompts.csv_columns": "prompts.columns.csv_columns",
    "reports": "callbacks.reports",
    "resume": "checkpoints.resume",
    "rewards.equations": "rewards.answers.equations",
    "rewards.numbers": "rewards.answers.numbers",
    "rewards.references": "rewards.answers.references",
    "rewards.runner": "rewards.processes.runner",
    "rewards.sandbox": "rewards.processes.sandbox",
    "rewards.units": "rewards.answers.units",
    "rewards.worker": "rewards.processes.worker",
    "rewards.workers": "rewards.processes.workers",
    "rollout.ahead": "rollout.live",
    "rollout.collector": "rollout.groups",
    "rollout.engine": "engines.base",
    "rollout.hub_names": "engines.vllm.hub_names",
    "rollout.partition": "rollout.updates.partition",
    "rollout.plan": "rollout.updates",
    "rollout.prefixes": "engines.prefixes",
    "rollout.replica": "engines.replica",
    "rollout.requests": "engines.vllm.requests",
    "rollout.sampler": "rollout.generation",
    "rollout.source": "rollout.rollouts",
    "rollout.store": "rollout.saved",
    "rollout.together": "common.distributed",
    "rollout.transformers_engine": "engines.transformers_engine",
    "rollout.vllm_classes": "engines.vllm.transformers_classes",
    "rollout.vllm_engine": "engines.vllm.engine",
    "rollout.vllm_options": "engines.vllm.options",
    "rollout.vllm_server": "engines.vllm.server",
    "rollout.vllm_teacher": "engines.vllm.teacher",
    "rollout.vllm_transfer": "engines.vllm.nccl_transport",
    "rollout.vllm_worker": "engines.vllm.worker",
    "rollout.watch": "rollout.statistics",
    "rollout.weight_files": "engines.weight_files",
    "rollout.weight_route": "engines.weight_transport",
    "samples": "callbacks.reports",
    "schedules": "callbacks.schedules.curves",
    "scorer": "models.scorer",
    "serve": "cli.serve",
    "server_client": "engines.http_client",
    "settings": "cli.settings",
    "shard_loading": "models.shard_loading",
    "sharding": "models.sharding",
    "strategies": "trainer.strategies",
    "supervised": "datamodule.supervised",
    "teachers.adapter_off": "teachers.self_teachers.adapter_off",
    "trainer.devices": "trainer.checks.devices",
    "trainer.group_checks": "trainer.checks.groups",
    "trainer.limits": "trainer.checks.limits",
    "trainer.monitors": "trainer.checks.monitors",
    "untyped": "common.untyped",
    "weights": "models.weights",
}

# Names of 0.1 without a successor of the same kind, and what to write instead.
GONE = {
    "WeightedSum": (
        "write GRPO with `distill: SurrogateTerm`, which weights a second loss (see "
        "docs/methods/README.md)"
    ),
}


def install() -> None:
    """Let Python find the package's modules by their former names too."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())


# `Any`: type checkers take this return type as the type of names found by a module's `__getattr__`.
def names_of(*modules: str) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a package that has the name of a former module.

    Args:
        modules: modules that hold the former module's names today.
    """

    def find(name: str) -> Any:
        for module in () if name.startswith("__") else modules:
            found = getattr(import_module(module), name, None)
            if found is not None:
                return found
        raise AttributeError(f"no attribute {name!r}")

    return find


class MovedModules(MetaPathFinder):
    """Finds a module by its former name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module that is imported by its former name; None for other names."""
        old = fullname.removeprefix(f"{PACKAGE}.")
        for head in (old, old.rpartition(".")[0]):
            if fullname != old and head in MOVED:
                new = f"{PACKAGE}.{MOVED[head]}{old[len(head) :]}"
                return ModuleSpec(fullname, _Forward(new), is_package=True)
        return None


class _Forward(Loader):
    def __init__(self, new: str) -> None:
        self.new = new

    def create_module(self, spec: ModuleSpec) -> None:
        """Return None, so that Python makes a plain module."""

    def exec_module(self, module: ModuleType) -> None:
        """Copy the names of today's module into it, and warn."""
        today = import_module(self.new)
        text = (
            f"`{module.__name__}` must be imported as `{self.new}`: got the former name, which 0.3 "
            "removes. Change the import or class path."
        )
        warnings.warn(text, FutureWarning, stacklevel=2)
        module.__dict__.update({k: v for k, v in vars(today).items() if not k.startswith("__")})
