"""Reads a model's generation configuration, even an invalid one: our sampling does not use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdrl_lightning.common.untyped import HFConfig, Tree
from kdrl_lightning.errors import ConfigurationError

# `Any`: the content of a JSON file.

NAME = "generation_config.json"


def read_generation(path: str) -> Tree | None:
    """Return the settings in a model's ``generation_config.json``; None if it has none.

    Args:
        path: folder or hub name of the model.

    Raises:
        ConfigurationError: the file is not a JSON object, or its end tokens are not ids.
    """
    from transformers.utils.hub import cached_file

    file: str | None = str(Path(path) / NAME)
    if not Path(path).is_dir():
        try:
            file = cached_file(path, NAME, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError):
            return None
    if file is None or not Path(file).is_file():
        return None
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigurationError(
            f"{NAME} must be a JSON object: got other content in {path}. Download the model "
            "again, or remove the file."
        )
    check_end_ids(found.get("eos_token_id"), path)
    return found


def check_end_ids(value: Any, where: str) -> list[int]:
    """Return the end token ids of a configuration as a list.

    Args:
        value: ``eos_token_id``: None, one id, or several.
        where: the model's name, for the message.

    Raises:
        ConfigurationError: a value is not an id.
    """
    several = isinstance(value, list | tuple)
    ids = [] if value is None else list(value) if several else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ConfigurationError(
            f"`eos_token_id` must be a token id or a list of ids: got {value!r} in a "
            f"configuration of {where}. Correct its config.json or generation_config.json."
        )
    return ids


def generation_config(values: Tree) -> HFConfig:
    """Return transformers' ``GenerationConfig`` with these settings, even if it refuses them.

    It refuses, for example, ``num_return_sequences: 2`` without sampling.
    """
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_dict(values)
    except (ValueError, TypeError):
        made = GenerationConfig()
        for name, value in values.items():
            setattr(made, name, value)
        return made
