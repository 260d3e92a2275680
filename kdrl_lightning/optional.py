"""The one place where the libraries of the extra ``tasks`` are imported."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from kdrl_lightning.errors import ConfigurationError


def load_library(module: str) -> Any:
    """Import a library of the extra ``tasks``, or a module of one.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"`{module}` must be installed: got {error}. Run `pip install 'kdrl_lightning[tasks]'`."
        ) from error
