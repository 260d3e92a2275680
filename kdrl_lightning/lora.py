"""Low-rank adapters on a frozen student (LoRA, arXiv 2106.09685), by peft.

peft injects its layers into the transformers model, which keeps its class: decoder, head,
generation and the names of its layers stay where engines, sharding and scorer look for them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdrl_lightning.errors import ConfigurationError, require_between

ADAPTER = "default"  # peft's name of a single adapter


class LoRA:
    """Trains ``W + alpha / rank * B A`` with ``W`` frozen, in the linear layers of the student.

    ``B`` starts at 0, so the policy starts as the base model; ``A`` is drawn from the run's seed.

    Args:
        rank: columns of ``B`` and rows of ``A``.
        alpha: scale; the update of a weight is multiplied by ``alpha / rank``.
        target_modules: names of the adapted linear layers, e.g. ``[q_proj, v_proj]``, or
            ``all-linear`` for all but the head.
        dropout: must be 0, for rollouts and updates have to see one policy.

    Raises:
        ConfigurationError: peft is missing, or a value cannot be.
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
                "`lora` must have peft: got no installation of it. "
                "Install it with `pip install 'kdrl_lightning[lora]'`."
            )
        require_between("rank", rank, 1, float("inf"))
        if not 0.0 < alpha < float("inf"):
            raise ConfigurationError(f"`alpha` must be above 0: got {alpha}.")
        if dropout:
            raise ConfigurationError(
                f"`dropout` must be 0 for adapters: got {dropout}. Rollouts, old log-probabilities "
                "and updates have to see one policy; regularise with weight decay or a KL."
            )
        if not target_modules:
            raise ConfigurationError(
                "`target_modules` must name a layer: got none. `all-linear` takes all."
            )
        if isinstance(target_modules, str) and target_modules != "all-linear":
            target_modules = [target_modules]
        self.rank = rank
        self.alpha = alpha
        self.target_modules = target_modules

    def identity(self) -> dict[str, Any]:
        """Return what tells one kind of adapter from another, in plain values."""
        names = self.target_modules
        return {
            "rank": self.rank,
            "alpha": float(self.alpha),
            "target_modules": names if isinstance(names, str) else sorted(set(names)),
        }

    def inject(self, model: Any, seed: int) -> None:
        """Freeze a transformers model and give it adapters, the same ones for the same seed.

        Raises:
            ConfigurationError: ``target_modules`` names what is no linear layer below the head.
        """
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=self._targets(model),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model, ADAPTER)
        model.eval()  # peft's new modules are in training mode

    def _targets(self, model: Any) -> list[str]:
        """Return the names as given, or for ``all-linear`` the paths of the layers."""
        modules, head = dict(model.named_modules()), model.get_output_embeddings()
        # The scorer reads the head's weight; an adapter there would be passed by.
        linear = {p for p, m in modules.items() if isinstance(m, nn.Linear) and m is not head}
        wrong: list[str] = []
        if isinstance(self.target_modules, str):
            names, wrong = sorted(linear), [] if linear else [self.target_modules]
        else:
            names = self.target_modules
            found = {n: {p for p in modules if f".{p}".endswith(f".{n}")} for n in names}
            wrong = [name for name, paths in found.items() if not paths or paths - linear]
        if wrong:
            known = sorted({path.rpartition(".")[2] for path in linear})
            raise ConfigurationError(
                f"`target_modules` must name linear layers below the head of "
                f"{type(model).__name__}: got {', '.join(wrong)}. "
                f"Known: {', '.join(known) or 'none'}."
            )
        return names


def adapted_layers(model: Any) -> dict[str, Any]:
    """Return peft's layers by their path; none in a plain model."""
    return {path: m for path, m in model.named_modules() if hasattr(m, "lora_A")}


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter.

    >>> is_adapter("model.layers.0.mlp.up_proj.lora_A.default.weight")
    True
    """
    return ".lora_A." in name or ".lora_B." in name


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Let a model be its base for a while."""
    layers = adapted_layers(model).values()
    # Not peft's ``enable_adapters``: it flips ``requires_grad`` too, which optimizer, DDP and FSDP2
    # have looked at once and for all.
    for layer in layers:
        layer._disable_adapters = True
        assert layer.disable_adapters, "peft has renamed its switch"
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def leave_base_out(module: nn.Module) -> None:
    """Let a module's ``state_dict`` hold what is trained, and nothing of the base beside it."""

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        trained = {prefix + name for name, p in module.named_parameters() if p.requires_grad}
        for name in [n for n in state if n.startswith(prefix) and n not in trained]:
            del state[name]

    module.register_state_dict_post_hook(drop)


def adapter_weights(model: Any) -> dict[str, Tensor]:
    """Return the adapters of a whole model by their names."""
    return {name: p.detach() for name, p in model.named_parameters() if is_adapter(name)}


def save_adapters(model: Any, adapters: dict[str, Tensor], folder: Path, base: str) -> None:
    """Write peft's folder, which ``PeftModel.from_pretrained`` puts on the base model.

    ``inject_adapter_in_model`` leaves no ``PeftModel`` that would write it itself.

    Args:
        model: with adapters.
        adapters: by their names in it, as they shall be written.
        folder: to write to.
        base: folder or hub name of the base model, for the adapter's configuration.
    """
    from safetensors.torch import save_file

    config = model.peft_config[ADAPTER]
    config.base_model_name_or_path, config.inference_mode = base, True
    config.target_modules = sorted(config.target_modules)  # peft's set has no order
    config.save_pretrained(str(folder))
    plain = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor.contiguous()
        for name, tensor in adapters.items()
    }
    save_file(plain, folder / "adapter_model.safetensors", metadata={"format": "pt"})
