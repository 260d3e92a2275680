"""Reports an error in a user's module or class in one line, with file and line number.

Types are ``Any``, as in jsonargparse.
"""

from __future__ import annotations

import traceback
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from kdrl_lightning.cli.settings.private import typehints
from kdrl_lightning.cli.settings.unused import note
from kdrl_lightning.errors import ConfigurationError, TrainingStopped, disk_error, path_error

# Errors in our classes keep their traceback; `build_optimizer` reports those in torch's.
OTHERWISE = ("kdrl_lightning.", "torch.")
# A user's mistake is never in these files.
MACHINERY = ("<frozen importlib", str(Path(typehints.__file__).parent), str(Path(__file__).parent))

_import = typehints.import_object


def import_object(name: str, *args: Any, **kwargs: Any) -> Any:
    """Import an object by its path, as jsonargparse does.

    Raises:
        ValueError: the module raises an error while it is imported.
    """
    try:
        with _defaults_restored(name):
            return _import(name, *args, **kwargs)
    except (Exception, SystemExit) as error:
        place = place_of(error)
        if not place or _is_lookup(error):  # the module or its attribute is missing
            raise
        raise ValueError(
            f"must name a module that can be imported: got {name}, which raises {shown(error)}"
            f"{place}. Correct the module."
        ) from error


def _defaults_restored(name: str) -> AbstractContextManager[None]:
    """Restore torch's defaults if a module or a constructor changes them, and note the change."""
    from kdrl_lightning.rewards.processes.surroundings import DEFAULTS, restored  # imports torch

    cure = "which the run depends on: it is restored. Change it only where it is needed."
    return restored(lambda change: note(f"{name} changed {change}, {cure}"), DEFAULTS)


def _is_lookup(error: BaseException) -> bool:
    """Return whether a module's ``__getattr__`` says that it has no such attribute."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, AttributeError) and frames[-1].name == "__getattr__"


def build(class_type: type[Any], *args: Any, **kwargs: Any) -> Any:
    """Build an object from its settings.

    Raises:
        ConfigurationError: its constructor raises an error.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException  # imports torch

    try:
        with _defaults_restored(class_type.__name__):
            return class_type(*args, **kwargs)
    except (ConfigurationError, MisconfigurationException, TrainingStopped):
        raise
    except Exception as error:
        known = disk_error(error) is not None or path_error(error) is not None
        if known or class_type.__module__.startswith(OTHERWISE):
            raise
        raise ConfigurationError(
            f"`{class_type.__name__}` must be possible to build: got {shown(error)}"
            f"{place_of(error)}. Correct its settings, or install what it needs."
        ) from error


def shown(error: BaseException) -> str:
    """Return an error's type and text."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {text}".removesuffix(": ").removesuffix(".")


def place_of(error: BaseException) -> str:
    """Return " (FILE, line N)" for an error in the user's code; "" if it arose elsewhere."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    users = [
        f
        for f in frames
        if not f.filename.startswith(MACHINERY) and "site-packages" not in f.filename
    ]
    return f" ({Path(users[-1].filename).name}, line {users[-1].lineno})" if users else ""
