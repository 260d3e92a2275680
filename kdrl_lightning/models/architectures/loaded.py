"""Refuses weight files that do not fit their model; transformers only reports the differences."""

from __future__ import annotations

from collections.abc import Iterable

from kdrl_lightning.common.untyped import HFModel, Tree
from kdrl_lightning.errors import ConfigurationError


def check_loaded(model: HFModel, info: Tree, path: str) -> None:
    """Check transformers' report on loading a model.

    Args:
        model: the loaded model.
        info: transformers' ``output_loading_info``.
        path: folder or hub name of the model, for messages.

    Raises:
        ConfigurationError: the files lack some weights, which would be random, hold some in other
            shapes, or hold weights that their layer does not use.
    """
    if info["mismatched_keys"]:
        name, held, wanted = min(info["mismatched_keys"])
        raise ConfigurationError(
            f"the weights of `{path}` must have the shapes of its config.json: got {name} of shape "
            f"{list(held)}, and {list(wanted)} by the configuration. Correct the configuration, or "
            "download the model again."
        )
    if info["missing_keys"]:
        missing, extra = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        rest += f" (the files also hold {extra[0]}, which no layer has)" if extra else ""
        raise ConfigurationError(
            f"the files of `{path}` must hold all weights of a {type(model).__name__}: got none "
            f"for {missing[0]}{rest}. Correct config.json, or save the whole model again."
        )
    check_used(model, info["unexpected_keys"], path)


def check_trainable(model: HFModel, path: str) -> None:
    """Refuse to train quantized weights, which get no gradient.

    Raises:
        ConfigurationError: a weight is not a float of at least 16 bits.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            raise ConfigurationError(
                f"the weights of `{path}` must not be quantized to be trained: got {name} in "
                f"{str(parameter.dtype).removeprefix('torch.')}. Name the folder of the "
                "unquantized model, or use this one as a teacher."
            )


def check_used(model: HFModel, unread: Iterable[str], path: str) -> None:
    """Refuse a model with a layer that ignores some of its tensors, such as a bias or a scale.

    We accept files with whole layers that the model does not have, such as those for drafting or
    images.

    Args:
        model: the loaded model.
        unread: names of tensors in its files that it did not use.
        path: folder or hub name of the model, for messages.

    Raises:
        ConfigurationError: a layer ignores a tensor.
    """
    for name in sorted(unread):
        owner, _, leaf = name.rpartition(".")
        layer = dict(model.named_modules()).get(owner)
        if owner and layer is not None and next(layer.parameters(False), None) is not None:
            raise ConfigurationError(
                f"the layers of `{path}` must use all of their weights: got {name} in the files, "
                f"and a {type(layer).__name__} without `{leaf}`. Correct config.json (biases, or "
                "`quantization_config`), or use another copy of the model."
            )
