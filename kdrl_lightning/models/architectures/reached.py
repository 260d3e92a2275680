"""Finds and freezes parameters that get no gradient from text, e.g. those of a vision tower."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from kdrl_lightning.common.untyped import HFModel


def unreached(model: HFModel) -> set[str]:
    """Return the names of trainable parameters that get no gradient from the logits of a short row.

    We walk the graph of one forward pass over 8 ids and compute no gradients. The set is empty if
    the model cannot run on ids alone; ``verify`` then raises an error with the reason.
    """
    ids = torch.arange(8, device=model.device)[None] % model.get_output_embeddings().weight.shape[0]
    try:
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return set()
    found: set[int] = set()
    nodes, seen = [logits.grad_fn], {logits.grad_fn}
    while nodes:
        node = nodes.pop()
        found.add(id(getattr(node, "variable", None)))
        new = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= new
        nodes += new
    return {name for name, p in model.named_parameters() if p.requires_grad and id(p) not in found}


def freeze(model: HFModel, names: set[str], layers: Iterable[nn.Module]) -> list[str]:
    """Freeze parameters that text never reaches, because DDP would wait for their gradients.

    Parameters inside a layer that text does reach stay trainable: longer rows may reach them. If
    the model names no layers, all stay trainable.

    Args:
        model: the model to train.
        names: names of parameters that a short row does not reach.
        layers: the model's layers, see ``decoder_layers``, including those of a vision tower.

    Returns:
        Those of ``names`` that stay trainable, sorted.
    """
    inside, known = set(), list(layers)
    if not known:
        return sorted(names)
    for layer in known:
        of = {id(p) for p in layer.parameters()}
        in_layer = {name for name, p in model.named_parameters() if id(p) in of}
        if not in_layer <= names:  # some of the layer is reached
            inside |= in_layer & names
    for name, parameter in model.named_parameters():
        if name in names - inside:
            parameter.requires_grad_(False)
    return sorted(inside)
