"""Finds the configuration of a model by its name, without weights and without a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import load_config

SHIPPED = Path(__file__).with_name("shapes.json")

# `Any` in this file: transformers has no type that all configurations share.


def config_of(name: str, given: Mapping[str, str]) -> Any:
    """Return a model's configuration.

    It comes from the file in ``given``, else from the configurations that this library ships, else
    from the model's folder or the hub's cache.

    Args:
        name: folder or hub name.
        given: files or folders with a ``config.json``, by the name of the model.

    Raises:
        ConfigurationError: there is none, or transformers does not know its architecture.
    """
    if name in given:
        return _from_values(_read(given[name], name), name)
    known = shipped()
    if name in known and not Path(name).is_dir():
        return _from_values(known[name], name)
    try:
        return load_config(name)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"the configuration of a model must be available: got none for {name}. Give its file "
            f"with `--model-config {name}=config.json`, or name a folder that has one."
        ) from error


@cache
def shipped() -> dict[str, dict[str, Any]]:
    """Return the configurations that this library ships, by the names of their models."""
    families = json.loads(SHIPPED.read_text(encoding="utf-8"))
    return {
        name: family["all"] | values
        for family in families
        for name, values in family["models"].items()
    }


def _read(file: str, name: str) -> dict[str, Any]:
    path = Path(file) / "config.json" if Path(file).is_dir() else Path(file)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"`--model-config {name}` must be a config.json: got {file} ({error}). Name the file "
            "of the model's repository."
        ) from error
    if not isinstance(values, dict):
        raise ConfigurationError(
            f"`--model-config {name}` must be a config.json: got {file}, without settings. Name "
            "the file of the model's repository."
        )
    return values


def _from_values(values: Mapping[str, Any], name: str) -> Any:
    from transformers import AutoConfig

    settings = dict(values)
    kind = settings.pop("model_type", None)
    try:
        return AutoConfig.for_model(kind, **settings)
    except Exception as error:  # each architecture raises different errors
        raise ConfigurationError(
            f"the configuration of {name} must be of an architecture that transformers knows: got "
            f"model_type {kind} ({' '.join(str(error).split())[:120]}). Check the file."
        ) from error
