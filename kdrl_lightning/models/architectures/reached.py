"""Parameters that text never reaches, such as those of a model's vision tower."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def unreached(model: Any) -> set[str]:
    """Return the trainable parameters that get no gradient from the logits of a row of ids.

    It walks the graph of a short forward pass and makes no gradients. A model that cannot run so
    has none here: the scorer says why.
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


def freeze(model: Any, names: set[str], layers: Iterable[nn.Module]) -> list[str]:
    """Freeze parameters that text never reaches; ddp would wait for their gradients.

    Those inside a layer that text does reach stay as they are: longer rows may reach them. So
    does a model that names no layers.

    Args:
        model: whose other parameters are trained.
        names: of the parameters that a short row does not reach.
        layers: its decoder layers, and others of that size.

    Returns:
        The names of those that stay trainable, and get no gradient from short rows.
    """
    inside, known = set(), list(layers)
    if not known:
        return sorted(names)
    for layer in known:
        of = {id(p) for p in layer.parameters()}
        own = {name for name, p in model.named_parameters() if id(p) in of}
        if not own <= names:  # some of the layer is reached
            inside |= own & names
    for name, parameter in model.named_parameters():
        if name in names - inside:
            parameter.requires_grad_(False)
    return sorted(inside)
