"""Imports the private functions of jsonargparse that this package uses.

The public interface can neither replace how a value is read nor tell which file is being read.
After an update of jsonargparse, run ``tests/cli/settings`` and widen ``CHECKED`` here and in
``pyproject.toml``.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

from kdrl_lightning.errors import ConfigurationError

CHECKED = ">=4.53,<4.60"
TYPEHINTS = (
    "ActionTypeHint",
    "UnvalidatedType",
    "accepts_any_value",
    "adapt_typehints",
    "callable_origin_types",
    "discard_init_args_on_class_path_change",
    "get_all_subclass_paths",
    "import_object",
    "load_value",
    "root_types",
    "sequence_origin_types",
    "sub_defaults",
    "tuple_set_origin_types",
)
UTIL = ("NestedArg", "config_load_stack")
ACTIONS = ("_ActionConfigLoad",)


def private(module: str, names: tuple[str, ...]) -> Any:  # mypy sees no attributes of a module
    """Return a module of jsonargparse after checking that it has all these names.

    Raises:
        ConfigurationError: the installed version lacks a name.
    """
    try:
        found = import_module(f"jsonargparse.{module}")
        lacking = [name for name in names if not hasattr(found, name)]
    except ImportError:
        lacking = [module]
    if lacking:
        raise ConfigurationError(
            f"`jsonargparse` must be {CHECKED}: got {version('jsonargparse')}, without "
            f"{', '.join(lacking)}. Run `pip install 'jsonargparse[signatures]{CHECKED}'`."
        )
    return found


typehints = private("_typehints", TYPEHINTS)
util = private("_util", UTIL)
actions = private("_actions", ACTIONS)
