"""The student's weights under the names and in the layouts of its model folder, as vLLM needs them.

transformers renames and fuses weights when it loads them (the experts of a layer become one
tensor), and ``save_pretrained`` reverts that. This module reverts it one layer at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kdrl_lightning.models.weights import ModelWeights, narrowed

# `Any`: transformers has no type that all models share.

LAYER = re.compile(r"(.*?\.\d+\.)")  # conversions fuse tensors of one layer, never of several
EXPERT = re.compile(r"\.experts\.(\d+)\.")


class HubWeights:
    """Reads a model's weights as ``save_pretrained`` would write them.

    Stored buffers are included: some expert routers keep a correction bias there.

    Args:
        weights: weights of the student.
        dtype: dtype of the engine; large weights are cast to it, see ``narrowed``. None casts
            nothing.
    """

    def __init__(self, weights: ModelWeights, dtype: torch.dtype | None = None) -> None:
        self._model = weights.model
        self._dtype = dtype
        self._stored = weights.stored(dtype)
        for name in self._unwritten():
            self._stored.pop(name, None)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield names and values, holding one tensor, or one layer if it needs conversion.

        The peak memory is the largest of these in the engine's dtype, and twice that while a layer
        is converted: 1.2 GB for the embedding of Qwen3-8B (152k tokens of width 4096) in bfloat16.

        Sharded tensors are all-gathered, so every rank must iterate to the end, even if it does not
        need the weights.
        """
        for names in self._groups:
            # No variable: it would keep the last group alive while the next one is gathered.
            yield from self._converted({name: self._stored[name][1]() for name in names}).items()

    def described(self) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Yield name, dtype and unsharded shape of each tensor of ``tensors``; no collective."""
        for names in self._groups:
            for name, tensor in self._converted({n: self._empty[n] for n in names}).items():
                yield name, tensor.dtype, tuple(tensor.shape)

    def _unwritten(self) -> list[str]:
        """Return names that ``save_pretrained`` leaves out, e.g. all but one of a tied weight."""
        ignored = getattr(self._model, "_keys_to_ignore_on_save", None) or ()
        tied = getattr(self._model, "all_tied_weights_keys", None) or {}
        both = self._stored.keys()
        return [
            *ignored,
            *(
                alias
                for alias, source in tied.items()
                if {alias, source} <= both and self._stored[alias][0] is self._stored[source][0]
            ),
        ]

    @cached_property
    def _empty(self) -> dict[str, Tensor]:
        """Tensors of the stored shapes and dtypes on the meta device."""
        return {
            name: narrowed(
                torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), self._dtype
            )
            for name, (tensor, _) in self._stored.items()
        }

    @cached_property
    def _new_names(self) -> dict[str, str]:
        """Map names in the model to names in the folder, for tensors that need no conversion."""
        # We rename the whole model at once, because some renamings depend on names seen before.
        turned = _revert(self._model, self._empty)
        names = {id(tensor): name for name, tensor in turned.items()}
        return {old: names[id(t)] for old, t in self._empty.items() if id(t) in names}

    @cached_property
    def _groups(self) -> list[list[str]]:
        """Names of tensors that must be read together, in the order of the model."""
        groups: dict[str, list[str]] = {}
        for name in self._empty:
            layer = LAYER.match(name)
            alone = name in self._new_names or layer is None
            # Tensor names have no space, so this key cannot clash with one.
            key = name if alone or layer is None else f"{layer[1]} converted"
            groups.setdefault(key, []).append(name)
        return list(groups.values())

    def _converted(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if len(tensors) == 1:
            ((name, tensor),) = tensors.items()
            if name in self._new_names:
                return {self._new_names[name]: tensor}
        reverted = _revert(self._model, tensors)
        return {name: tensor for name, tensor in reverted.items() if self._is_read(name)}

    def _is_read(self, name: str) -> bool:
        """Return whether vLLM needs a tensor: it has none for LongCat's experts that do nothing.

        transformers keeps values for these experts that it never reads.
        """
        config, expert = self._model.config.get_text_config(), EXPERT.search(name)
        idle = getattr(config, "zero_expert_num", None)
        return not idle or expert is None or int(expert[1]) < config.n_routed_experts


def _revert(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    reverted: Callable[..., dict[str, Tensor]] = revert_weight_conversion
    return reverted(model, tensors)
