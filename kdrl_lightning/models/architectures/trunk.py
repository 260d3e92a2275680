"""How the decoder layers of a model run: with which attention kernel, compiled or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from kdrl_lightning.common.untyped import HFModel
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses.head.compiled import OrPlain

# `Any`: the arguments of any layer.

ANYWHERE = ("sdpa", "eager")
ON_GPUS = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
PART = "the layers of a model"


@dataclass(frozen=True)
class Trunk:
    """Attention kernel and compilation of a model's decoder layers.

    Attributes:
        attn_implementation: transformers' name of the attention kernel; None: transformers' choice.
        compile: whether to run the layers through ``torch.compile``.

    Raises:
        ConfigurationError: transformers has no kernel of this name.
    """

    attn_implementation: str | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        name, known = self.attn_implementation, ANYWHERE + ON_GPUS
        if name is not None and name not in known:
            close = get_close_matches(str(name), known, n=1)
            cure = f"Did you mean {close[0]}?" if close else "Leave it out: sdpa is usual."
            raise ConfigurationError(
                f"`attn_implementation` must be one of {', '.join(known)}: got {name}. {cure}"
            )

    def check_device(self, device: torch.device) -> None:
        """Refuse a kernel that does not run on a device, before weights are loaded.

        Raises:
            ConfigurationError: the kernel needs a GPU.
        """
        if self.attn_implementation in ON_GPUS and device.type == "cpu":
            raise ConfigurationError(
                f"`attn_implementation` must be {' or '.join(ANYWHERE)} on a CPU: got "
                f"{self.attn_implementation}. Leave it out, or train on a GPU."
            )

    def prepare(self, model: HFModel) -> None:
        """Set the kernel for ``verify``, which checks the model on the CPU.

        Raises:
            ConfigurationError: the model cannot use the kernel.
        """
        if self.attn_implementation in ANYWHERE:
            use_kernel(model, self.attn_implementation)

    def settle(self, model: HFModel) -> None:
        """Set the run's kernel after ``verify``, which may have switched to eager attention.

        Raises:
            ConfigurationError: the model cannot use the kernel, or gives wrong logits with it.
        """
        name = self.attn_implementation
        if name in ON_GPUS:
            use_kernel(model, name)
        elif name is not None and kernel_of(model) != name:
            raise ConfigurationError(
                f"`attn_implementation` must be {kernel_of(model)} for {type(model).__name__}: got "
                f"{name}, which leaves out a part of its attention. Leave the setting out."
            )


def use_kernel(model: HFModel, name: str) -> None:
    """Let a model compute attention with the kernel ``name``.

    Raises:
        ConfigurationError: the architecture cannot use it, or its package is missing.
    """
    reason = "its attention has one form only"
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
    if kernel_of(model) != name:
        raise ConfigurationError(
            f"`attn_implementation` must be one that {type(model).__name__} can use here: got "
            f"{name} ({reason}). Install what is missing, or leave the setting out."
        )


def kernel_of(model: HFModel) -> str:
    """Return the name of the kernel that a model's text decoder uses."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


class Layer:
    """A layer's forward, which runs compiled as soon as ``on`` is True.

    Passes with a KV cache run uncompiled: a cache changes in each pass, so the compiler would make
    one graph per layer, and a pass that failed halfway could not be repeated.

    Args:
        forward: the layer's original forward.
    """

    on = False

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.plain = forward
        self.compiled = OrPlain(forward, PART)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        cached = kwargs.get("past_key_values") is not None
        return (self.compiled if self.on and not cached else self.plain)(*args, **kwargs)


def compile_layers(layers: Iterable[nn.Module]) -> Callable[[], None]:
    """Prepare layers for ``torch.compile``; return a function that switches it on.

    Until then they run uncompiled: the check on the CPU would wait for a compilation that a run on
    a GPU does not use.
    """
    made = []
    for layer in layers:
        made.append(Layer(layer.forward))
        layer.forward = made[-1]

    def switch_on() -> None:
        for one in made:
            one.on = True

    return switch_on
