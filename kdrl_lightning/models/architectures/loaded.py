"""Checks that a model holds what its folder's files hold: transformers only reports it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kdrl_lightning.errors import ConfigurationError


def check_loaded(model: Any, info: dict[str, Any], path: str) -> None:
    """Check what transformers reports of loading.

    Args:
        model: as it was loaded.
        info: its ``output_loading_info``.
        path: of the model.

    Raises:
        ConfigurationError: some weights are random for want of others, or files hold some for a
            layer that does not use them.
    """
    if info["mismatched_keys"]:
        name, held, wanted = min(info["mismatched_keys"])
        raise ConfigurationError(
            f"the weights of `{path}` must have the shapes of its config.json: got {name} of shape "
            f"{list(held)} where the configuration says {list(wanted)}. Correct the configuration, "
            "or download the model again."
        )
    if info["missing_keys"]:
        missing, extra = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        rest += f" (the files also hold {extra[0]}, which no layer has)" if extra else ""
        raise ConfigurationError(
            f"the files of `{path}` must hold all weights of a {type(model).__name__}: got none "
            f"for {missing[0]}{rest}. Correct its config.json, or save the whole model again."
        )
    check_used(model, info["unexpected_keys"], path)


def check_trainable(model: Any, path: str) -> None:
    """Check that weights which are to be trained are floats: 8-bit ones get no gradient.

    Raises:
        ConfigurationError: some are quantized.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            raise ConfigurationError(
                f"the weights of `{path}` must not be quantized to be trained: got {name} in "
                f"{str(parameter.dtype).removeprefix('torch.')}. Name the folder of the "
                "unquantized model, or use this one as a teacher."
            )


def check_used(model: Any, unread: Iterable[str], path: str) -> None:
    """Check that no layer leaves out a tensor of its own, such as a bias or a scale.

    Whole layers that a model lacks are left out with reason: those for drafting, or for images.

    Args:
        model: as it was loaded.
        unread: names in its files that it did not use.
        path: of the model.

    Raises:
        ConfigurationError: it does.
    """
    for name in sorted(unread):
        owner, _, own = name.rpartition(".")
        layer = dict(model.named_modules()).get(owner)
        if owner and layer is not None and next(layer.parameters(False), None) is not None:
            raise ConfigurationError(
                f"the layers of `{path}` must use all of their weights: got {name} in its files, "
                f"and a {type(layer).__name__} without `{own}`. Correct its config.json (biases, "
                "or `quantization_config`), or take another copy of the model."
            )
