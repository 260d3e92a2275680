"""Low-rank adapters on a frozen student (LoRA, arXiv 2106.09685), with peft.

peft injects its layers into the transformers model, which keeps its class. Decoder, head,
generation and layer names stay where engines, sharding and scorer look for them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdrl_lightning.common.untyped import HFModel, State
from kdrl_lightning.errors import ConfigurationError, require_count
from kdrl_lightning.models.lora.targets import ALL, find_targets

# `Any`: peft's layers have no common type.

ADAPTER = "default"  # peft's name of a single adapter


class LoRA:
    """Trains ``W + alpha / rank * B A`` with ``W`` frozen, in the student's text decoder.

    ``B`` starts at 0, so the policy starts as the base model; ``A`` is drawn from the run's seed.
    Source: arXiv 2106.09685, section 4.1.

    Args:
        rank: columns of ``B`` and rows of ``A``, at least 1.
        alpha: scale, above 0; the update of a weight is multiplied by ``alpha / rank``.
        target_modules: names of the adapted linear layers or fused experts, e.g.
            ``[q_proj, v_proj]`` or ``[experts.down_proj]``; ``all-linear`` selects all of both
            except the head and routers.
        dropout: must be 0, because rollouts and updates must see one policy.

    Raises:
        ConfigurationError: peft is not installed, or a value is out of range.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float = 32.0,
        target_modules: list[str] | str = "all-linear",
        dropout: float = 0.0,
    ) -> None:
        if importlib.util.find_spec("peft") is None:
            raise ConfigurationError(
                "peft must be installed for `lora`: got no installation of it. "
                "Install it with `pip install 'kdrl_lightning[lora]'`."
            )
        require_count("rank", rank, 1, float("inf"))
        if not 0.0 < alpha < float("inf"):
            raise ConfigurationError(
                f"`alpha` must be above 0: got {alpha}. A common choice is twice the rank."
            )
        if dropout:
            raise ConfigurationError(
                f"`dropout` must be 0 for adapters: got {dropout}. Rollouts, old log-probabilities "
                "and updates must see one policy; regularise with weight decay or a KL term."
            )
        if not target_modules:
            raise ConfigurationError(
                "`target_modules` must name a layer: got none. Use `all-linear` for all layers."
            )
        if isinstance(target_modules, str) and target_modules != ALL:
            target_modules = [target_modules]
        self.rank = rank
        self.alpha = alpha
        self.target_modules = target_modules

    def identity(self) -> State:
        """Return the settings that two runs must share to exchange adapters, as plain values."""
        names = self.target_modules
        return {
            "rank": self.rank,
            "alpha": float(self.alpha),
            "target_modules": names if isinstance(names, str) else sorted(set(names)),
        }

    def inject(self, model: HFModel, seed: int) -> None:
        """Freeze a transformers model and add adapters to it.

        Args:
            model: the model; it is changed in place.
            seed: seed of the initial ``A``.

        Raises:
            ConfigurationError: ``target_modules`` names what cannot be adapted, the rank is too
                high, or peft refuses the model.
        """
        from peft import LoraConfig, inject_adapter_in_model

        targets = find_targets(model, self.target_modules, self.rank)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=targets.modules,
            target_parameters=targets.parameters or None,
            task_type="CAUSAL_LM",
        )
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        model._base_order = {name: place for place, name in enumerate(names)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(config, model, ADAPTER)
            except (ValueError, TypeError, NotImplementedError) as error:
                raise ConfigurationError(
                    f"`lora` must fit {type(model).__name__}: got {self.identity()}, which peft "
                    f"refuses ({str(error).strip().splitlines()[0]}). Name other `target_modules`."
                ) from error
        model.eval()  # peft's new modules are in training mode


def base_order(model: HFModel) -> dict[str, int]:
    """Return each weight's position before adapters were added; empty for a plain model.

    Positions change: peft removes an expert's weight from its module for a forward pass and puts it
    back last.
    """
    return getattr(model, "_base_order", {})


def adapted_layers(model: HFModel) -> dict[str, Any]:
    """Return peft's layers by the name of the weight that each adapts; empty for a plain model."""
    found = {}
    layers = [(path, m) for path, m in model.named_modules() if hasattr(m, "lora_A")]
    for path, layer in layers:
        inner = layer
        while hasattr(inner, "lora_A"):  # adapters of several weights of one module are nested
            inner, path = inner.base_layer, f"{path}.base_layer"
        found[f"{path}.{getattr(layer, 'parameter_name', 'weight')}"] = layer
    return found


def add_update(layer: Any, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return a weight plus its adapter's update, computed in float32 or wider.

    Args:
        layer: peft's layer, for its scale and the order of an expert's dimensions.
        weight: ``[out, in]``, or experts ``[E, out, in]`` (``[E, in, out]`` in some models).
        a: ``[rank * E, in]``.
        b: ``[out, rank * E]``; adjacent columns belong to different experts.

    Returns:
        A new tensor of the weight's shape and dtype.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b, scale = a.to(wide), b.to(wide), layer.scaling[ADAPTER]
    with torch.autocast(weight.device.type, enabled=False):
        if weight.dim() == 2:
            return torch.addmm(weight.to(wide), b, a, alpha=scale).to(weight.dtype)
        experts = len(weight)
        a = a.view(experts, -1, a.shape[-1])  # [E, rank, in]
        b = b.view(b.shape[0], -1, experts)  # [out, rank, E]
        out = torch.empty_like(weight)
        for i, expert in enumerate(weight):  # one at a time, since float32 copies are large
            update = b[..., i] @ a[i]
            update = update if layer._did_swap_in_out_features else update.T
            out[i] = torch.add(expert.to(wide), update, alpha=scale)
        return out


def is_adapter(name: str) -> bool:
    """Return whether a parameter belongs to an adapter.

    >>> is_adapter("model.layers.0.mlp.up_proj.lora_A.default.weight")
    True
    """
    return ".lora_A." in name or ".lora_B." in name


@contextmanager
def adapters_off(model: HFModel) -> Iterator[None]:
    """Switch a model's adapters off inside the context."""
    layers = adapted_layers(model).values()
    # peft's ``enable_adapters`` would also flip ``requires_grad``, which optimizer, DDP and FSDP2
    # read only once.
    for layer in layers:
        layer._disable_adapters = True
        assert layer.disable_adapters, "peft has renamed its switch"
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def leave_base_out(module: nn.Module) -> None:
    """Make a module's ``state_dict`` hold only the trained parameters, without the base model."""

    def drop(module: nn.Module, state: State, prefix: str, _: object) -> None:
        trained = {prefix + name for name, p in module.named_parameters() if p.requires_grad}
        for name in [n for n in state if n.startswith(prefix) and n not in trained]:
            del state[name]

    module.register_state_dict_post_hook(drop)


def adapter_weights(model: HFModel) -> dict[str, Tensor]:
    """Return the adapter weights of an unsharded model by name."""
    return {name: p.detach() for name, p in model.named_parameters() if is_adapter(name)}


def save_adapters(model: HFModel, adapters: dict[str, Tensor], folder: Path, base: str) -> None:
    """Write adapters as a peft folder, which ``PeftModel.from_pretrained`` loads.

    We write it ourselves, because ``inject_adapter_in_model`` makes no ``PeftModel`` that could.

    Args:
        model: the model with adapters; its adapter configuration is written.
        adapters: the weights to write, by their names in the model.
        folder: the folder to write.
        base: folder or hub name of the base model, for the adapter's configuration.
    """
    from safetensors.torch import save_file

    config = model.peft_config[ADAPTER]
    config.base_model_name_or_path, config.inference_mode = base, True
    # peft keeps sets, whose order may change between runs.
    config.target_modules = sorted(config.target_modules)
    if config.target_parameters:
        config.target_parameters = sorted(config.target_parameters)
    config.save_pretrained(str(folder))
    plain = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor.contiguous()
        for name, tensor in adapters.items()
    }
    save_file(plain, folder / "adapter_model.safetensors", metadata={"format": "pt"})
