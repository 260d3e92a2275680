"""The hidden states that the head of any transformers causal language model reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdrl_lightning.common.untyped import HFModel

# `Any`: each model takes different inputs.


def decoder_of(model: HFModel) -> HFModel | None:
    """Return the module of a model that holds everything but its head; None if there is none.

    transformers' ``get_decoder`` may return the whole model (Llama 4) or its head.
    """
    from transformers import PreTrainedModel

    for part in (model.get_decoder(), *model.children()):
        if (
            isinstance(part, PreTrainedModel)
            and part is not model
            and part.get_output_embeddings() is None
        ):
            return part
    return None


class _Reached(Exception):  # noqa: N818
    """Raised when the head is called; carries the head's input."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def states_at_head(model: HFModel, **inputs: Any) -> Tensor:
    """Run a model up to its head and return the head's input, ``[B, S, H]``.

    Use it for models that transform the decoder's states before the head (BERT), or that have no
    decoder module. Logits are not computed.

    Raises:
        RuntimeError: the model does not call its output embeddings.
    """

    def stop(_: object, args: tuple[Tensor, ...]) -> None:
        raise _Reached(args[0])

    handle = model.get_output_embeddings().register_forward_pre_hook(stop)
    try:
        model(**inputs)
    except _Reached as found:
        return found.hidden
    finally:
        handle.remove()
    raise RuntimeError(f"{type(model).__name__} does not call its output embeddings")
