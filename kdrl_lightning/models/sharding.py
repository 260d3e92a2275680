"""Shards models over ranks: FSDP2's ``fully_shard`` on each layer, and on the scorer around them.

We call torch's API directly, because the head of any transformers causal language model must be
inside the wrapped forward, and existing trainers do not arrange that.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from kdrl_lightning.common.untyped import HFModel
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.architectures.loaded import check_trainable, check_used
from kdrl_lightning.models.architectures.reached import freeze, unreached
from kdrl_lightning.models.architectures.trunk import Layer, Trunk, compile_layers
from kdrl_lightning.models.architectures.values import check_finite, check_floats, check_stored
from kdrl_lightning.models.loading import frozen_names, load_causal_lm, unfilled_causal_lm
from kdrl_lightning.models.lora import LoRA, leave_base_out
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.shard_loading import WeightFiles, fill, sources, to_meta

# `Any`: the arguments of any layer.


@dataclass(frozen=True)
class Sharding:
    """Splits parameters over all ranks: each decoder layer is an FSDP unit, the scorer the root.

    A rank holds ``1 / ranks`` of every parameter, gradient and optimizer state. In a forward or
    backward pass it also holds one whole layer (two while it fetches the next), the embedding and
    the head.

    Attributes:
        mesh: a one-dimensional mesh over all ranks.
        param_dtype: dtype in which a trained model computes; weights keep their dtype, and
            gradients are reduced in float32. None computes in the weights' dtype.
        frozen_dtype: the same for a frozen model.
    """

    mesh: DeviceMesh
    param_dtype: torch.dtype | None = None
    frozen_dtype: torch.dtype | None = None

    def as_trained(self) -> Sharding:
        """Return a copy in which frozen models compute in ``param_dtype``, too."""
        return replace(self, frozen_dtype=self.param_dtype)

    def shard(self, scorer: Scorer, offload: bool = False) -> Scorer:
        """Shard a scorer in place and return it.

        Args:
            scorer: a scorer on any device; on ``meta``, ``fill`` loads its weights afterwards.
            offload: keep this rank's shards on the CPU and move them to the device for each pass.
        """
        trained = any(p.requires_grad for p in scorer.parameters())
        computes = self.param_dtype if trained else self.frozen_dtype
        policy = MixedPrecisionPolicy()
        if computes is not None:
            policy = MixedPrecisionPolicy(computes, reduce_dtype=torch.float32)
        pin = self.mesh.device_type == "cuda"
        wrap = partial(
            fully_shard,
            mesh=self.mesh,
            # For the root, too: otherwise embedding and head stay gathered in the compute dtype
            # after a pass without gradient, and readers of the weights find no DTensor.
            reshard_after_forward=True,
            mp_policy=policy,
            offload_policy=CPUOffloadPolicy(pin_memory=pin) if offload else OffloadPolicy(),
        )
        for layer in decoder_layers(scorer.model):
            wrap(layer)
        # The scorer's only float inputs are another model's states, which must keep their dtype.
        wrap(scorer, mp_policy=replace(policy, cast_forward_inputs=False))
        for method in ("states", "alone", "head_gap", "chosen"):
            register_fsdp_forward_method(scorer, method)
        scorer.sharded, scorer.computes = True, computes
        return scorer


def load_scorer(
    path: str,
    dtype: torch.dtype | str,
    sharding: Sharding | None = None,
    *,
    vocab_size: int | None = None,
    swap: tuple[int, int] | None = None,
    frozen: bool = False,
    offload: bool = False,
    activation_checkpointing: bool = False,
    lora: LoRA | None = None,
    seed: int = 0,
    chunk_size: int | None = None,
    trunk: Trunk = Trunk(),
) -> Scorer:
    """Load a model as a scorer, shard it if requested, and check its scores against its logits.

    Args:
        path: Hugging Face folder or hub name.
        dtype: dtype of the weights; ``auto`` uses the checkpoint's.
        sharding: splits the weights over ranks; None keeps them whole.
        vocab_size: number of the head's rows to use; None uses all.
        swap: two ids whose logits are exchanged, or None.
        frozen: load the model without gradients.
        offload: see ``Sharding.shard``.
        activation_checkpointing: recompute each layer in the backward pass.
        lora: adapters to train instead of the model.
        seed: seed of the adapters' initial weights.
        chunk_size: tokens whose logits exist at once; None: as many as fit into about 64 MiB, on
            CUDA into 1 GiB.
        trunk: attention kernel and compilation of the layers.

    Raises:
        ConfigurationError: there is no valid model at ``path``, or the scorer cannot run it.
    """
    switch_on: list[Callable[[], None]] = []

    def adapt(model: HFModel) -> None:
        trunk.prepare(model)
        if not frozen and lora is None:
            check_trainable(model, path)
        fixed = frozen_names(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not frozen and name not in fixed)
        if lora is not None:
            lora.inject(model, seed)

    def wrap(model: HFModel) -> Scorer:
        scorer = Scorer(model, vocab_size, swap, chunk_size)
        if lora is not None:
            leave_base_out(scorer)
        if trunk.compile:
            switch_on.append(compile_layers(decoder_layers(model)))
        if activation_checkpointing:
            recompute_layers(model)
        return scorer if sharding is None else sharding.shard(scorer, offload)

    # Lightning makes the rank's GPU the default device here. transformers would then load into it
    # (with accelerate, which may be missing), even a teacher that should stay on the CPU.
    with torch.device("cpu"):
        scorer = None
        if sharding is not None:
            scorer = _from_slices(path, dtype, adapt, wrap, sharding, offload)
        if scorer is None:
            model = load_causal_lm(path, dtype)
            adapt(model)
            trains_all = sharding is None and not frozen and lora is None
            names = unreached(model) if trains_all else set()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".* names no layers")
                left = freeze(model, names, decoder_layers(model)) if names else []
            scorer = wrap(model)
            scorer.unreached = left
        check_floats(scorer.model, path)
        check_finite(scorer.model, path)
        scorer.verify(path)
    trunk.settle(scorer.model)
    for switch in switch_on:
        switch()
    return scorer


def _from_slices(
    path: str,
    dtype: torch.dtype | str,
    adapt: Callable[[HFModel], None],
    wrap: Callable[[HFModel], Scorer],
    sharding: Sharding,
    offload: bool,
) -> Scorer | None:
    """Shard an empty model and read each rank's rows; None if the files cannot be read in parts."""
    model, folder = unfilled_causal_lm(path, dtype)
    found = None
    if getattr(model.config, "quantization_config", None) is None:
        with suppress(SafetensorError):  # loading the whole model reports a damaged file
            files = WeightFiles(folder)
            found = sources(model, files)
    if found is not None:
        unread = files.names - set(found.values())
        check_used(model, unread, path)
        check_stored(model, folder, unread, path)
    if found is None:
        warnings.warn(
            f"the weights of {path} cannot be read in parts (no safetensors under the model's "
            "names): every rank loads all of them on the CPU before it keeps its part.",
            stacklevel=2,
        )
        return None
    adapt(model)
    state = model.state_dict(keep_vars=True)
    names = {n: found[id(t)] for n, t in state.items() if id(t) in found}
    adapters = {n: t.detach() for n, t in state.items() if id(t) not in found}
    to_meta(model)
    scorer = wrap(model)
    on = "cpu" if offload else sharding.mesh.device_type
    fill(scorer, model, names, files, adapters, on)
    return scorer


def decoder_layers(model: HFModel) -> list[nn.Module]:
    """Return a model's layers: modules of the classes that ``_no_split_modules`` names.

    We leave out layers inside other layers, and layers that share weights with the head, which go
    to the root. If the architecture names no layers, we warn: its root is the only FSDP unit.
    """
    # transformers keeps a list, a set or nothing there, on the model or on an inner one.
    names = {
        name for m in model.modules() for name in (getattr(m, "_no_split_modules", None) or ())
    }
    head = {id(p) for p in model.get_output_embeddings().parameters()}
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        shared = any(id(p) in head for p in module.parameters())
        named = any(c.__name__ in names for c in type(module).__mro__)  # sharding makes subclasses
        if named and not inside and not shared:
            found[path] = module
    if not found:
        warnings.warn(
            f"{type(model).__name__} names no layers (`_no_split_modules`): it is sharded as one "
            "unit, so every rank holds all of its weights during a pass.",
            stacklevel=2,
        )
    return list(found.values())


def recompute_layers(model: HFModel) -> None:
    """Keep only each decoder layer's input for the backward pass and recompute the rest.

    transformers' ``gradient_checkpointing_enable`` works only in training mode, which a policy
    never uses because of dropout, and switches off the cache that sampling needs. Parameter names
    do not change.

    Raises:
        ConfigurationError: the architecture names no layers.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ConfigurationError(
            "`activation_checkpointing` must be false for an architecture without named layers: "
            f"got true for {type(model).__name__}. Set it to false."
        )
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # Early stop leaves a layer by an exception, which `OrPlain` would take for a compiler failure.
    with set_checkpoint_early_stop(not isinstance(forward, Layer)):
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a sharded tensor; return any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether ``flag`` is true on at least one rank; all ranks must call it."""
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value)
