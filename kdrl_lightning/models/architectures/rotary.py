"""Rotary embeddings that depend on a row's length: chosen for each row instead of each batch.

transformers chooses one embedding for a batch by its largest position. With longrope (Phi-3, Phi-4)
and dynamic NTK, a token's log-probability then depends on the longest row of its batch, and with
dynamic NTK also on earlier batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdrl_lightning.common.untyped import HFModel
from kdrl_lightning.rollout_batch import upload

# `Any`: the rotary modules of transformers share no typed base.

# Attribute of a rotary module after `decide_per_row`: the row lengths of this pass, or None.
MARK = "row_lengths"


def decide_per_row(model: HFModel) -> None:
    """Make a model's rotary modules choose the embedding row by row; repeat calls do nothing."""
    for module in _switching(model):
        if not hasattr(module, MARK):
            setattr(module, MARK, None)
            module.forward = partial(_forward, module, module.forward)


@contextmanager
def lengths_of_rows(model: HFModel, lengths: Tensor | None) -> Iterator[None]:
    """Set the row lengths for passes inside the context.

    Args:
        model: a model after ``decide_per_row``.
        lengths: ``[B]``, in tokens, without padding on the right; on the CPU, so that the host need
            not wait for a GPU. None: a row ends at its largest position.
    """
    modules = _switching(model)
    for module in modules:
        setattr(module, MARK, lengths)
    try:
        yield
    finally:
        for module in modules:
            setattr(module, MARK, None)


def switch_lengths(model: HFModel) -> list[tuple[int, bool]]:
    """Return the row lengths beyond which rotary embeddings change.

    Returns:
        Pairs of a length, and whether the embedding changes again with every further token.
    """
    found = set()
    for module in _switching(model):
        kinds = module.rope_type
        layers = list(kinds) if isinstance(kinds, dict) else [None]
        for layer in layers:
            if _changes(_kind(module, layer)):
                found.add((_limit(module, layer), "dynamic" in _kind(module, layer)))
    return sorted(found)


def _switching(model: HFModel) -> list[Any]:
    """Return the rotary modules whose embedding depends on length (``dynamic_rope_update``)."""
    out = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        named = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(isinstance(kind, str) and _changes(kind) for kind in named):
            out.append(module)
    return out


def _changes(kind: str) -> bool:
    return "dynamic" in kind or kind == "longrope"


def _kind(module: Any, layer: str | None) -> str:
    return str(module.rope_type if layer is None else module.rope_type[layer])


def _limit(module: Any, layer: str | None) -> int:
    if "dynamic" in _kind(module, layer):
        return int(module.original_max_seq_len)
    named = module.config.rope_parameters
    named = named if layer is None else named[layer]
    return int(named["original_max_position_embeddings"])


def _forward(
    module: Any, forward: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None
) -> Any:
    """Return the embeddings of ``position_ids [B, S]``; rows with the same one share a call."""
    call = {} if layer_type is None else {"layer_type": layer_type}
    lengths = getattr(module, MARK)
    if not _changes(_kind(module, layer_type)) or position_ids.ndim != 2:
        return forward(x, position_ids, **call)
    if lengths is not None and len(position_ids) == 1:
        position_ids = position_ids.expand(len(lengths), -1)
    ends = position_ids.amax(1) + 1 if lengths is None else lengths
    limit, dynamic = _limit(module, layer_type), "dynamic" in _kind(module, layer_type)
    # Each number stands for one embedding; 0 is the plain one.
    way = torch.where(ends > limit, ends if dynamic else torch.ones_like(ends), 0)
    parts = []
    for each in way.unique().tolist():
        rows = upload((way == each).nonzero().squeeze(1), position_ids.device)
        chosen = position_ids[rows]
        if dynamic:  # a call with one position resets the module to the plain embedding
            forward(x, torch.zeros_like(chosen[:1, :1]), **call)
        if dynamic or not each:  # padding must not switch the embedding
            chosen = chosen.clamp(max=(each or limit) - 1)
        parts.append((rows, forward(x, chosen, **call)))
    if len(parts) == 1:
        return parts[0][1]
    if isinstance(parts[0][1], Tensor):
        return _joined(parts, len(ends))
    columns = range(len(parts[0][1]))
    return tuple(_joined([(rows, out[i]) for rows, out in parts], len(ends)) for i in columns)


def _joined(parts: list[tuple[Tensor, Tensor]], size: int) -> Tensor:
    whole = parts[0][1].new_empty(size, *parts[0][1].shape[1:])
    for rows, values in parts:
        whole[rows] = values
    return whole
