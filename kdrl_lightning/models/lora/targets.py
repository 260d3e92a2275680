"""Which weights of a model LoRA adapts: linear layers and fused experts of its text decoder."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdrl_lightning.common.untyped import HFModel
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.architectures.hidden_states import decoder_of

# `Any`: torch types an attribute of a module as a tensor or a module.

ALL = "all-linear"
# transformers keeps a layer's experts in one 3-D parameter, often with gate and up fused into one.
FUSED = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
HALVES = (("gate_proj", "up_proj"), ("w1", "w3"))
# In a model with experts, peft mistakes modules with these names for experts of older checkpoints.
# It accepts them as parameters.
OLD_EXPERT_NAMES = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
ROUTERS = ("gate", "wg", "shared_expert_gate")
WARN_ABOVE = 0.1  # share of the decoder's weights that `all-linear` leaves without an adapter


@dataclass(frozen=True)
class Targets:
    """Paths of the weights that peft adapts.

    Attributes:
        modules: linear layers, peft's ``target_modules``.
        parameters: experts, and linear layers named like experts: peft's ``target_parameters``.
    """

    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Adaptable:
    """The weights of a model's text decoder that adapters can change.

    Attributes:
        modules: all modules of the decoder by path.
        linear: linear layers by path, without the head.
        experts: fused experts ``[E, ...]`` by path.
    """

    modules: dict[str, nn.Module]
    linear: dict[str, nn.Module]
    experts: dict[str, Tensor]

    def named(self, name: str) -> set[str]:
        """Return the paths of adaptable weights that end with ``name``."""
        return _ending((*self.linear, *self.experts), name)

    def width(self, path: str) -> int:
        """Return the largest rank that an update of the weight at ``path`` can have."""
        weight: Any = self.linear[path].weight if path in self.linear else self.experts[path]
        return int(min(weight.shape[-2:]))


def find_targets(model: HFModel, names: Sequence[str] | str, rank: int) -> Targets:
    """Return the weights that ``names`` select.

    Args:
        model: a transformers causal language model.
        names: ends of paths, or ``all-linear`` for every linear layer and all experts of the text
            decoder except routers.
        rank: rank of the adapters.

    Raises:
        ConfigurationError: a name matches no such weight, or the rank exceeds every width.
    """
    known = adaptable(model)
    if isinstance(names, str):
        chosen = {p for p in (*known.linear, *known.experts) if not is_router(p)}
        chosen = {p for p in chosen if not _bypassed(model, p)}
        if not chosen:
            raise _no_match(model, known, [names])
        _warn_of_the_rest(model, known, chosen)
    else:
        chosen = _chosen(model, known, names)
    widest = max(known.width(path) for path in chosen)
    if rank > widest:
        raise ConfigurationError(
            f"`rank` must be at most {widest}, the width of the widest adapted layer: got {rank}. "
            "Lower it: a higher rank adds parameters but cannot express more."
        )
    return _for_peft(model, known, chosen, names)


def adaptable(model: HFModel) -> Adaptable:
    """Return the linear layers and fused experts of the part of a model that the scorer runs."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is head:  # ModernBERT returns its head as decoder
        decoder = decoder_of(model)
    root = next((path for path, m in model.named_modules() if m is decoder), "")
    tied = _tied(model)
    modules = _text_modules(decoder, root)
    linear: dict[str, nn.Module] = {}
    experts: dict[str, Tensor] = {}
    for path, module in modules.items():
        if isinstance(module, nn.Linear):
            # An adapter on the head would do nothing: the scorer reads its weight, not its output.
            if module is not head and _maps(module) and id(module.weight) not in tied:
                linear[path] = module
        else:
            experts |= {f"{path}.{name}": p for name, p in _experts(module) if id(p) not in tied}
    return Adaptable(modules, linear, experts)


def _text_modules(decoder: HFModel, root: str) -> dict[str, nn.Module]:
    """Return a decoder's modules without nested models of another type, e.g. a vision tower."""
    modules = dict(decoder.named_modules(prefix=root))
    kind = _model_type(decoder)
    others = [path for path, m in modules.items() if _model_type(m) not in (None, kind)]
    return {
        path: m
        for path, m in modules.items()
        if not any(f"{path}.".startswith(f"{other}.") for other in others)
    }


def _model_type(module: object) -> str | None:
    return getattr(getattr(module, "config", None), "model_type", None)


def _maps(layer: nn.Linear) -> bool:
    """Return whether a layer maps ``[..., in]`` to ``[..., out]``; subclasses may not."""
    if type(layer).forward is nn.Linear.forward or not layer.weight.is_floating_point():
        return True
    try:
        with torch.no_grad():
            out = layer(layer.weight.new_zeros(2, layer.in_features))
    except Exception:  # a subclass may need another input shape
        return False
    return isinstance(out, Tensor) and out.shape == (2, layer.out_features)


def is_router(path: str) -> bool:
    """Return whether a layer chooses or weights experts.

    >>> is_router("model.layers.0.mlp.gate"), is_router("model.layers.0.mlp.gate_proj")
    (True, False)
    """
    return path.rpartition(".")[2] in ROUTERS or "router" in path


def _experts(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters(recurse=False):
        known = name in FUSED or "Expert" in type(module).__name__
        if known and parameter.dim() == 3 and parameter.is_floating_point():
            yield name, parameter


def _tied(model: HFModel) -> set[int]:
    """Return the ``id`` of each tied weight: an adapter would change only one of its uses."""
    seen: set[int] = set()
    tied: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


def _chosen(model: HFModel, known: Adaptable, names: Sequence[str]) -> set[str]:
    chosen: set[str] = set()
    wrong = []
    for name in names:
        paths = known.named(name) | _fused(known, name, names)
        if not paths or _ending(known.modules, name) - known.linear.keys():
            wrong.append(name)
        chosen |= paths
    if wrong:
        raise _no_match(model, known, wrong)
    bypassed = sorted({p.rpartition(".")[2] for p in chosen if _bypassed(model, p)})
    if bypassed:
        raise ConfigurationError(
            f"`target_modules` must be layers whose output {type(model).__name__} uses: got "
            f"{', '.join(bypassed)}, whose weights it reads directly. Leave them out, or use "
            "`all-linear`, which does."
        )
    return chosen


def _fused(known: Adaptable, name: str, names: Sequence[str]) -> set[str]:
    """Return the paths of fused experts that contain the projection ``name``.

    Users know such names from older checkpoints, which keep gate and up projection apart.

    Raises:
        ConfigurationError: ``names`` has one half of a fused projection without the other.
    """
    if name == "w2":
        return known.named("down_proj") & known.experts.keys()
    for halves in HALVES:
        if name not in halves:
            continue
        fused = known.named("gate_up_proj") & known.experts.keys()
        if fused and "gate_up_proj" not in names and not set(halves) <= set(names):
            (other,) = set(halves) - {name}
            raise ConfigurationError(
                f"`target_modules` must name both {name} and {other} in a model whose experts "
                f"store both in one tensor: got only {name}. Add {other}, or leave {name} out."
            )
        return fused
    return set()


def _for_peft(
    model: HFModel, known: Adaptable, chosen: set[str], names: Sequence[str] | str
) -> Targets:
    """Split paths into modules and parameters; keep the user's names if they select the same."""
    parameters = sorted(chosen & known.experts.keys())
    linear = sorted(chosen & known.linear.keys())
    if known.experts:
        old = [p for p in linear if p.rpartition(".")[2] in OLD_EXPERT_NAMES]
        parameters += [f"{path}.weight" for path in old]
        linear = [path for path in linear if path not in old]
    elif not isinstance(names, str):
        paths = [path for path, _ in model.named_modules()]
        meant = {path for name in names for path in _ending(paths, name)}
        linear = list(names) if meant == chosen else linear
    return Targets(linear, parameters)


def _ending(paths: Iterable[str], name: str) -> set[str]:
    return {path for path in paths if f".{path}".endswith(f".{name}")}


def _no_match(model: HFModel, known: Adaptable, wrong: Sequence[str]) -> ConfigurationError:
    names = sorted({path.rpartition(".")[2] for path in (*known.linear, *known.experts)})
    return ConfigurationError(
        f"`target_modules` must name linear layers below the head of {type(model).__name__}, in "
        f"its text decoder: got {', '.join(wrong)}. Known: {', '.join(names) or 'none'}."
    )


def _bypassed(model: HFModel, path: str) -> bool:
    """Return whether the model may read a layer's weight directly, and so bypass an adapter."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    parent, _, leaf = path.rpartition(".")
    if leaf == "dt_proj" and hasattr(model.get_submodule(parent), "A_log"):  # Mamba, Jamba
        return True
    config = LoraConfig(task_type="CAUSAL_LM")
    with suppress(AttributeError):  # another version of peft may lack this check
        try:
            LoraModel._check_target_module_compatiblity(None, config, model, leaf)  # type: ignore[arg-type]
        except ValueError:
            return True
    return False


def _warn_of_the_rest(model: HFModel, known: Adaptable, chosen: set[str]) -> None:
    """Warn if ``all-linear`` leaves much of the decoder without adapters."""
    embedding = {id(p) for p in model.get_input_embeddings().parameters()}
    embedding |= {id(p) for p in model.get_output_embeddings().parameters()}
    adapted = {id(m.weight) for path, m in known.linear.items() if path in chosen}
    adapted |= {id(p) for path, p in known.experts.items() if path in chosen}
    rest = {
        f"{path}.{name}": p
        for path, module in known.modules.items()
        for name, p in module.named_parameters(recurse=False)
        if id(p) not in embedding
    }
    frozen = {n: p.numel() for n, p in rest.items() if id(p) not in adapted and p.dim() > 1}
    share = sum(frozen.values()) / max(1, sum(p.numel() for p in rest.values()))
    if share > WARN_ABOVE:
        largest = max(frozen, key=lambda name: frozen[name])
        warnings.warn(
            f"`target_modules: all-linear` leaves {share:.0%} of the decoder's weights without an "
            f"adapter, e.g. {largest}: they are not linear layers that peft can adapt.",
            stacklevel=2,
        )
