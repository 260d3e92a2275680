"""Decides what a resumed run takes from its checkpoint and what from its configuration.

Weights, moments and progress come from the checkpoint; everything that a user can set comes from
the configuration, so that flags take effect.
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

from kdrl_lightning.common.untyped import State
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import all_settings
from kdrl_lightning.trainer.internals import before_restore
from kdrl_lightning.trainer.protocols import TrainedModule, trained

# `Any`: optimizers and schedulers of torch share no type, and Lightning wraps them.

KEY = "kdrl_lightning"
# Settings of a model that do not change what its weights compute.
NOT_COMPARED = re.compile(
    r"_.*|architectures|(torch_)?dtype|transformers_version|use_cache|.*_token_id|.*_token_index"
    r"|output_.*|.*return_dict|initializer_.*|.*dropout|chunk_size_feed_forward|id2label|label2id"
    r"|num_labels|problem_type|pretraining_tp|router_(aux_loss|z_loss)_coef|finetuning_task"
)


class HasJSON(Protocol):
    """A model's configuration, as transformers keeps it."""

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return its settings as JSON."""


def identity(module: TrainedModule) -> State:
    """Return what identifies a run in its checkpoints, in plain values."""
    model = module.weights().model
    lora = module.lora
    generation = getattr(model, "generation_config", None)
    return {
        "objective": type(module.objective).__name__,
        "optimizer": optimizer_name(module),
        "student": module.student_path,
        "vocabulary": module.vocabulary,
        "config": model.config.to_json_string(use_diff=False),
        "generation_config": None if generation is None else generation.to_json_string(),
        "lora": None if lora is None else {**lora.identity(), "base": module.base_digest()},
        "self_teachers": module.frozen.kinds,
        "initial": module.frozen.initial_digests(),
    }


def optimizer_name(module: TrainedModule) -> str:
    """Return the class name of a module's optimizer, which need not exist yet."""
    return type(module.optimizer_callable([torch.nn.Parameter(torch.zeros(1))])).__name__


def agree_before_loading(trainer: pl.Trainer, mark: Callable[[str | None], str | None]) -> None:
    """Let all processes compare their checkpoints before any of them reads one.

    Each process finds ``last`` by itself, or gets a path from its launcher. If the paths differ,
    ddp would train on moments and positions of different runs, and fsdp2 would read the first
    process's checkpoint.

    Args:
        trainer: the run's trainer.
        mark: returns a checksum of the checkpoint at a path; None if it cannot be read.
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
    """Check that all processes continue from one checkpoint; all must call it.

    Args:
        path: path of this process's checkpoint; None: it starts from the beginning.
        mark: checksum of its content; None: it cannot be read.
        broadcast: returns the value that the first process passes.
        reduce: ``(tensor, "max") -> tensor`` over ranks.

    Raises:
        ConfigurationError: on all processes, if their checkpoints differ, even under the same path.
    """
    mark = mark or str(path)
    first, first_mark = broadcast(path), broadcast(mark)
    if float(reduce(torch.tensor(float(mark != first_mark)), "max")):
        other = "another one at this path" if path == first else path
        raise ConfigurationError(
            f"`ckpt_path` must be the same on all processes: got {first} and {other}. Name a "
            "checkpoint that all of them see, instead of `last`."
        )


def check_identity(
    saved: State, module: TrainedModule, config: HasJSON, fitting: bool, path: str
) -> None:
    """Refuse a checkpoint of another model or, if training continues, of another method.

    Args:
        saved: what ``identity`` returned.
        module: the module that will load the checkpoint.
        config: the configuration of its student.
        fitting: whether training continues; then the method must match, too.
        path: path of the checkpoint.

    Raises:
        ConfigurationError: they differ; the message names the difference.
    """
    different = difference(config.to_json_string(use_diff=False), saved["config"])
    if different is not None:
        name, here, there = different
        raise ConfigurationError(
            f"`ckpt_path` must hold this student: got {path}, whose {name} is {there!r} "
            f"instead of {here!r}. Give the student of that run, {saved['student']}."
        )
    if saved.get("vocabulary", module.vocabulary) != module.vocabulary:  # 0.1 saved none
        raise ConfigurationError(
            f"`student` must have the tokenizer of the checkpoint: got {module.student_path}, "
            f"whose token ids differ from those in {path}. Give the student of that run, "
            f"{saved['student']}."
        )
    check_adapters(saved, module, path)
    objective = type(module.objective).__name__
    if fitting and objective != saved["objective"]:
        raise ConfigurationError(
            f"`ckpt_path` must be of a run with the objective {objective}: got {path}, made by "
            f"{saved['objective']}. To continue with another method, export that student and "
            "start from it."
        )
    if fitting:
        here = module.frozen.kinds
        without = [kind for kind in here if kind == "AdapterOffTeacher"]  # 0.1 had these alone
        check_kinds(here, saved.get("self_teachers", without), path)
    optimizer = optimizer_name(module)
    if fitting and optimizer != saved["optimizer"]:
        raise ConfigurationError(
            f"`optimizer` must be {saved['optimizer']} to continue from {path}, which holds its "
            f"moments: got {optimizer}. To use another one, export that student and start from it."
        )


def check_kinds(here: list[str], there: list[str], path: str) -> None:
    """Refuse to continue with a self-teacher of another kind.

    Args:
        here: class names of the run's self-teachers.
        there: class names of the checkpoint's.
        path: path of the checkpoint.

    Raises:
        ConfigurationError: they differ.
    """
    if here == there:
        return
    got, held = (" and ".join(kinds) or "no self-teacher" for kinds in (here, there))
    raise ConfigurationError(
        f"the self-teacher must be of the checkpoint's kind: got {got}, but the run of "
        f"{path} had {held}. Set `model.teacher` to that, or export the student and start from it."
    )


def check_initial(here: list[str], saved: State, path: str) -> None:
    """Refuse a student other than the one that the run started from, if that one is the teacher.

    Args:
        here: checksums of the models that this run loaded as initial students.
        saved: what ``identity`` returned.
        path: path of the initial student.

    Raises:
        ConfigurationError: they differ.
    """
    if here and here != saved["initial"]:
        raise ConfigurationError(
            "`student` must be the model that the run started from, which is its teacher: got "
            f"{path}, with different weights. It started from {saved['student']}."
        )


def difference(here: str, there: str) -> tuple[str, object, object] | None:
    """Return the first setting in which two configurations describe different models.

    The installed version of transformers reads both first, and translates the names that it
    changed. Settings that only one of them has are ignored, because versions write different names.

    Args:
        here: JSON of all settings.
        there: JSON of all settings, perhaps by another version.

    Returns:
        The setting's name and both values; None if they describe the same model.
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


def check_adapters(saved: State, module: TrainedModule, path: str) -> None:
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
            f"`lora` must be that of the checkpoint: got {wanted}, but {path} holds {found}. Set "
            "`model.lora` to it, or export that student and start from it."
        )
    if base is not None and base != module.base_digest():
        raise ConfigurationError(
            f"`student` must be the base model of the adapters in {path}: got "
            f"{module.student_path}, with different weights. They were trained on "
            f"{saved['student']}."
        )


def check_complete(held: Collection[str], wanted: Collection[str], path: str) -> None:
    """Refuse missing or unknown adapters, which torch would skip silently.

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


def number_by_place(state: State, optimizer: Any, module: torch.nn.Module) -> None:
    """Number an optimizer's parameters in its state by their place in the module.

    torch numbers only the optimizer's parameters; Lightning's fsdp strategies number all, including
    frozen ones, so each would misread a file of the other. torch itself loads by order.
    ``optimizer`` is the one that ``LightningModule.optimizers`` returns.
    """
    places = {id(p): place for place, p in enumerate(module.parameters())}
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    number = {old: places[id(p)] for old, p in enumerate(trained)}
    state["state"] = {number[old]: value for old, value in state["state"].items()}
    for group in state["param_groups"]:
        group["params"] = [number[old] for old in group["params"]]


class Settings:
    """The optimizer's and the schedule's settings, as configured.

    The state of optimizers and schedules contains settings (learning rate, betas, length of a
    schedule), so loading a checkpoint restores the old ones. ``reapply`` undoes this: it restores
    the configured settings, and steps the schedule to the run's step. A schedule depends only on
    the number of steps, so an unchanged configuration gives exactly the same learning rates.
    """

    def __init__(self, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
        self._groups = [
            {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        self._schedule = None if scheduler is None else copy.deepcopy(scheduler.state_dict())

    def reapply(self, optimizer: Optimizer, scheduler: Any | None, steps: int) -> None:
        """Apply the settings again, for a run that has taken ``steps`` optimizer steps.

        ``scheduler`` is the one that ``LightningModule.lr_schedulers`` returns.

        Raises:
            ConfigurationError: the schedule ends before the run's step.
        """
        for group, settings in zip(optimizer.param_groups, self._groups, strict=True):
            group.update(copy.deepcopy(settings))
        if scheduler is None or self._schedule is None:
            return
        scheduler.load_state_dict(copy.deepcopy(self._schedule))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch expects optimizer steps before these
            try:
                for _ in range(steps):
                    scheduler.step()
            except ValueError as error:
                raise ConfigurationError(
                    f"`lr_scheduler` must not end before step {steps}, where this run resumes: "
                    f"got {error}. Give it more steps."
                ) from error
