"""Builds the models of a run from their configurations, with fake weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import _disable_current_modes

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.hardware.planning.job import Job
from kdrl_lightning.hardware.planning.shapes import config_of
from kdrl_lightning.losses.logprobs import auto_chunk_size
from kdrl_lightning.models.architectures.hidden_states import decoder_of
from kdrl_lightning.models.architectures.implementations import keep_precision, keep_soft_caps
from kdrl_lightning.models.architectures.trunk import Trunk
from kdrl_lightning.models.loading import frozen_names, model_path
from kdrl_lightning.models.lora import leave_base_out
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import Sharding, decoder_layers, recompute_layers
from kdrl_lightning.module import KDRLModule
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.frozen import initial_student
from kdrl_lightning.teachers.local import LocalTeacher

# `Any`: models and configurations of transformers share no typed base.

# We count a student of more layers with fewer, unless its configuration says that layers differ.
DEEP = 8
MIXED = ("first_k_dense_replace", "num_kv_shared_layers", "mlp_only_layers", "moe_layer_freq")


def student_of(module: KDRLModule, job: Job, sharding: Sharding | None) -> Scorer:
    """Build the student as ``load_scorer`` does, with fake weights."""
    model = student_config_model(module, job)
    fixed = frozen_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in fixed)
    if module.lora is not None:
        with _disable_current_modes():
            module.lora.inject(model, 0)
    allot(model)
    scorer = Scorer(model, chunk_size=chunk_of(module.chunk_size, rows_of_head(model), job))
    scorer.shares = may_share(scorer, sharding)
    if module.lora is not None:
        leave_base_out(scorer)
    if module.activation_checkpointing:
        recompute_layers(model)
    return scorer if sharding is None else sharding.shard(scorer)


def second_student(module: KDRLModule, job: Job, sharding: Sharding | None) -> Scorer:
    """Build a second, frozen copy of the student, as ``SelfTeacher`` does, with fake weights."""
    model = allot(student_config_model(module, job).requires_grad_(False))
    scorer = Scorer(model, chunk_size=chunk_of(module.chunk_size, rows_of_head(model), job))
    scorer.shares = may_share(scorer, sharding)
    return scorer if sharding is None else sharding.as_trained().shard(scorer)


def plain_model(module: KDRLModule, job: Job, dtype: torch.dtype | None = None) -> Any:
    """Return the student's model without adapters, with fake weights.

    Args:
        module: the module of the run.
        job: the run's other settings.
        dtype: type of the weights; None: the student's.
    """
    return allot(student_config_model(module, job, dtype))


def student_config_model(module: KDRLModule, job: Job, dtype: torch.dtype | None = None) -> Any:
    """Return the student's model on the ``meta`` device, as its configuration describes it."""
    double = torch.float64 if job.precision == "64-true" else torch.float32
    config = config_of(model_path(module.student_source), job.model_configs)
    if job.depth is not None:
        text = config.get_text_config()
        text.num_hidden_layers = job.depth
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: job.depth]
    return weightless(config, dtype or double, module.trunk)


def depth_of(module: KDRLModule, job: Job) -> int | None:
    """Return the number of a deep student's layers if they are all equal; else None."""
    config = config_of(model_path(module.student_source), job.model_configs).get_text_config()
    layers = int(getattr(config, "num_hidden_layers", 0))
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    mixed = any(getattr(config, name, None) for name in MIXED)
    return layers if layers > DEEP and len(kinds) == 1 and not mixed else None


def frozen_scorer(teacher: LocalTeacher, job: Job, sharding: Sharding | None) -> Scorer:
    """Build the scorer of a ``LocalTeacher`` as the teacher does, with fake weights."""
    config = config_of(model_path(teacher.model), job.model_configs)
    own = getattr(config, "dtype", None) or torch.float32
    chosen = own if teacher.dtype == "auto" else teacher.dtype
    dtype = chosen if isinstance(chosen, torch.dtype) else getattr(torch, chosen)
    model = allot(weightless(config, dtype, teacher.trunk).requires_grad_(False))
    scorer = Scorer(model, chunk_size=chunk_of(teacher.chunk_size, rows_of_head(model), job))
    scorer.shares = may_share(scorer, sharding)
    return scorer if sharding is None else sharding.shard(scorer)


def reference_of(module: KDRLModule, job: Job) -> Teacher | None:
    """Return the reference that ``KDRLModule.setup`` uses by default; None if none is needed."""
    if not module.objective.needs_reference:
        return None
    double, adapters = job.precision == "64-true", module.lora is not None
    source = module.student_source
    return initial_student(source, adapters, double, module.chunk_size, module.trunk)


def chunk_of(given: int | None, vocabulary: int, job: Job) -> int:
    """Return how many rows of logits the head computes at once on the run's device."""
    return given or auto_chunk_size(vocabulary, "cuda" if job.on_gpu else "cpu")


def rows_of_head(model: Any) -> int:
    """Return the number of rows of a model's head."""
    return len(model.get_output_embeddings().weight)


def largest_layer(model: Any, mixed: bool) -> int:
    """Return the bytes of a model's largest layer in its compute type.

    Args:
        model: a sharded model.
        mixed: whether trained weights are cast to 16 bits.
    """
    sizes = []
    for layer in decoder_layers(model):
        weights = list(layer.parameters())
        narrow = mixed and any(p.requires_grad for p in weights)
        sizes.append(sum(p.numel() * (2 if narrow else p.element_size()) for p in weights))
    return max(sizes, default=0)


def weightless(config: Any, dtype: torch.dtype, trunk: Trunk = Trunk()) -> Any:
    """Return a transformers model of a configuration on the ``meta`` device.

    It uses torch's attention, which keeps the same tensors as other packages' flash kernels.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with _disable_current_modes(), no_init_weights(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    trunk.prepare(model)
    keep_soft_caps(model)
    keep_precision(model)
    return model.eval()


def allot(model: Any) -> Any:
    """Give a model on the ``meta`` device fake weights on the CPU; return the model.

    ``nn.Module.to`` cannot swap fake tensors that have other references.
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for place in (module._parameters, module._buffers):
            for name, old in place.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.zeros(old.shape, dtype=old.dtype)
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, old.requires_grad)
                    made[id(old)] = new
                place[name] = made[id(old)]
    return model


def may_share(scorer: Scorer, sharding: Sharding | None) -> bool:
    """Return whether the scorer would run shared prompts once.

    We decide by the configuration, because ``Scorer.verify`` needs real numbers.
    """
    config = scorer.model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return sharding is None and decoder_of(scorer.model) is not None and kinds == {"full_attention"}


@contextmanager
def process_group(ranks: int) -> Iterator[Any]:
    """Make a fake process group, which sends nothing, and yield its mesh.

    Args:
        ranks: number of ranks in the group.

    Raises:
        ConfigurationError: this process is in a group already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ConfigurationError(
            "a plan for fsdp2 must be made outside of a process group: got one that exists. Plan "
            "in a separate process."
        )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield init_device_mesh("cpu", (ranks,))
    finally:
        dist.destroy_process_group()


def work_on_lists(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer work on lists of tensors (``foreach``), torch's default on a GPU."""
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
