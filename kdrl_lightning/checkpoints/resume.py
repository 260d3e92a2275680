"""What a resumed run takes from its checkpoint, and what from its configuration.

Weights, moments and progress come from the checkpoint; everything that a user can set comes from
the configuration, so that the command line wins.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Collection
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import all_settings
from kdrl_lightning.trainer.internals import before_restore
from kdrl_lightning.trainer.protocols import TrainedModule, trained

KEY = "kdrl_lightning"
# Of a model's configuration: what says nothing about what its weights compute.
NOT_COMPARED = re.compile(
    r"_.*|architectures|(torch_)?dtype|transformers_version|use_cache|.*_token_id|.*_token_index"
    r"|output_.*|.*return_dict|initializer_.*|.*dropout|chunk_size_feed_forward|id2label|label2id"
    r"|num_labels|problem_type|pretraining_tp|router_(aux_loss|z_loss)_coef|finetuning_task"
)


class HasJSON(Protocol):
    """A model's configuration, as transformers keeps it."""

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return its settings as JSON."""


def identity(module: TrainedModule) -> dict[str, Any]:
    """Return what a checkpoint says of the run that wrote it, in plain values."""
    model = module.weights().model
    lora = module.lora
    generation = getattr(model, "generation_config", None)
    return {
        "objective": type(module.objective).__name__,
        "optimizer": optimizer_name(module),
        "student": module.student_path,
        "config": model.config.to_json_string(use_diff=False),
        "generation_config": None if generation is None else generation.to_json_string(),
        "lora": None if lora is None else {**lora.identity(), "base": module.base_digest()},
    }


def optimizer_name(module: TrainedModule) -> str:
    """Return the class of a module's optimizer, which need not be there yet."""
    return type(module.optimizer_callable([torch.nn.Parameter(torch.zeros(1))])).__name__


def agree_before_loading(trainer: pl.Trainer, mark: Callable[[str | None], str | None]) -> None:
    """Let all processes compare their checkpoints before any of them reads its own.

    Each process finds ``last`` by itself, or gets a path from its launcher. If these differ, ddp
    would train on moments and positions of different runs; fsdp2 would read the first process's.

    Args:
        trainer: of the run.
        mark: ``path -> mark`` of a checkpoint's content; None: it cannot be read.
    """
    if trainer.world_size == 1:
        return

    def compare(path: str | None) -> None:
        reduce = trained(trainer.lightning_module).reduce
        require_same(path, mark(path), trainer.strategy.broadcast, reduce)

    before_restore(trainer, compare)


def require_same(
    path: str | None,
    mark: str | None,
    broadcast: Callable[[str | None], str | None],
    reduce: Callable[[torch.Tensor, str], torch.Tensor],
) -> None:
    """Check that all processes go on from one checkpoint; collective.

    Args:
        path: of this process's checkpoint; None: it starts afresh.
        mark: of its content; None: it cannot be read.
        broadcast: returns what the first process passes.
        reduce: ``(tensor, "max") -> tensor`` over ranks.

    Raises:
        ConfigurationError: on all processes, if they hold different checkpoints, be it under one
            path.
    """
    mark = mark or str(path)
    first, first_mark = broadcast(path), broadcast(mark)
    if float(reduce(torch.tensor(float(mark != first_mark)), "max")):
        other = "another one under this path" if path == first else path
        raise ConfigurationError(
            f"`ckpt_path` must be the same on all processes: got {first} and {other}. Name a "
            "checkpoint that all of them see, instead of `last`."
        )


def check_identity(
    saved: dict[str, Any], module: TrainedModule, config: HasJSON, fitting: bool, path: str
) -> None:
    """Refuse the checkpoint of another model or, to train on, of another method.

    Args:
        saved: what ``identity`` returned.
        module: the module that is to take the checkpoint.
        config: the configuration of its student.
        fitting: training goes on: the method counts.
        path: of the checkpoint.

    Raises:
        ConfigurationError: they differ; the message names the difference.
    """
    different = difference(config.to_json_string(use_diff=False), saved["config"])
    if different is not None:
        name, here, there = different
        raise ConfigurationError(
            f"`ckpt_path` must hold this student: got {path}, whose {name} is {there!r} "
            f"instead of {here!r}. Give the student that it was made from, {saved['student']}."
        )
    check_adapters(saved, module, path)
    objective = type(module.objective).__name__
    if fitting and objective != saved["objective"]:
        raise ConfigurationError(
            f"`ckpt_path` must be of a run with the objective {objective}: got {path}, made by "
            f"{saved['objective']}. To go on with another method, export that student and start "
            "from it."
        )
    optimizer = optimizer_name(module)
    if fitting and optimizer != saved["optimizer"]:
        raise ConfigurationError(
            f"`optimizer` must be {saved['optimizer']} to go on from {path}, for its moments: got "
            f"{optimizer}. To go on with another one, export that student and start from it."
        )


def difference(here: str, there: str) -> tuple[str, object, object] | None:
    """Return the first setting in which two configurations describe different models.

    What only one of them names is left out: other versions of transformers write other names. Both
    are first read by this version, which translates the names that it has changed.

    Args:
        here: JSON of all settings.
        there: JSON of all settings, perhaps by another version.

    Returns:
        Its name and both values, or None.
    """
    return _difference(all_settings(here), all_settings(there), "")


def _difference(here: object, there: object, name: str) -> tuple[str, object, object] | None:
    if not (isinstance(here, dict) and isinstance(there, dict)):
        return None if here == there else (name, here, there)
    for key in sorted(here.keys() & there.keys()):
        if not NOT_COMPARED.fullmatch(key):
            found = _difference(here[key], there[key], f"{name}.{key}" if name else key)
            if found is not None:
                return found
    return None


def check_adapters(saved: dict[str, Any], module: TrainedModule, path: str) -> None:
    """Refuse adapters of another kind, or of another base model.

    Raises:
        ConfigurationError: they differ; the message names the difference.
    """
    here = None if module.lora is None else module.lora.identity()
    there = dict(saved.get("lora") or {})
    base = there.pop("base", None)
    if here != (there or None):
        found = "all weights" if not there else f"adapters with {_pairs(there)}"
        wanted = "all weights" if here is None else f"adapters with {_pairs(here)}"
        raise ConfigurationError(
            f"`lora` must be that of the checkpoint: got {wanted}, and {path} holds {found}. Set "
            "`model.lora` to it, or export that student and start from it."
        )
    if base is not None and base != module.base_digest():
        raise ConfigurationError(
            f"`student` must be the base model of the adapters in {path}: got "
            f"{module.student_path}, with other weights. They were trained on {saved['student']}."
        )


def check_complete(held: Collection[str], wanted: Collection[str], path: str) -> None:
    """Refuse adapters that are not all there, or unknown; torch passes over them in silence.

    Raises:
        ConfigurationError: their names differ.
    """
    stray = sorted(set(held) ^ set(wanted))
    if stray:
        raise ConfigurationError(
            f"`ckpt_path` must hold the adapters that it names: got {path}, where {stray[0]} is "
            "missing or unknown. It was changed, or written with another version of peft."
        )


def _pairs(values: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def number_by_place(state: dict[str, Any], optimizer: Any, module: torch.nn.Module) -> None:
    """Number an optimizer's parameters in its state by their place in the module.

    torch counts those of the optimizer alone, Lightning's fsdp strategies all, frozen ones too: a
    file that one of them wrote would be misread by the other. Loading into the same goes by order.
    The optimizer is what ``LightningModule.optimizers`` returns, one or a list by its type.
    """
    places = {id(p): place for place, p in enumerate(module.parameters())}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    number = {old: places[id(p)] for old, p in enumerate(trained)}
    state["state"] = {number[old]: value for old, value in state["state"].items()}
    for group in state["param_groups"]:
        group["params"] = [number[old] for old in group["params"]]


class Settings:
    """The optimizer's and the schedule's settings, as configured.

    Optimizers and schedules keep settings among their state (learning rate, betas, length of a
    schedule), and loading a checkpoint brings back the old ones. ``reapply`` undoes that: settings
    as configured, and the schedule stepped to where the run is. A schedule is a function of the
    number of steps, so an unchanged configuration gives the very same learning rates.
    """

    def __init__(self, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
        self._groups = [
            {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        self._schedule = None if scheduler is None else copy.deepcopy(scheduler.state_dict())

    def reapply(self, optimizer: Optimizer, scheduler: Any | None, steps: int) -> None:
        """Set them again, for a run that has taken ``steps`` optimizer steps.

        The schedule is what ``LightningModule.lr_schedulers`` returns, one or a list by its type.
        """
        for group, settings in zip(optimizer.param_groups, self._groups, strict=True):
            group.update(copy.deepcopy(settings))
        if scheduler is None or self._schedule is None:
            return
        scheduler.load_state_dict(copy.deepcopy(self._schedule))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no optimizer step comes before these
            try:
                for _ in range(steps):
                    scheduler.step()
            except ValueError as error:
                raise ConfigurationError(
                    f"`lr_scheduler` must not end before step {steps}, where this run goes on: "
                    f"{error}."
                ) from error
