"""The package's exceptions; the command line prints a ``ConfigurationError`` as a single line."""

from __future__ import annotations

import errno
import signal
from importlib import import_module
from typing import Any

# `Any`: an optional library, which type checkers may not find.

# Error numbers of a disk that cannot be written: full, over quota, read-only, not permitted.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}
# Error numbers of a path that cannot name a file.
PATH = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}


class ConfigurationError(ValueError):
    """Raised for a setting that cannot work; the message names the value, the rule and the cure."""


def require_between(name: str, value: float, low: float, high: float, cure: str = "") -> None:
    """Raise unless ``low <= value <= high`` (NaN and infinity fail too).

    Args:
        name: name of the setting, for the message.
        value: value of the setting.
        low: smallest value allowed.
        high: largest value allowed; ``float("inf")`` if there is no bound.
        cure: what the user can do, for the message.

    Raises:
        ConfigurationError: the value is not a number or lies outside the bounds.

    >>> require_between("trrd_alpha", 0.5, 0.0, 1.0)
    """
    if not isinstance(value, int | float):
        raise ConfigurationError(f"`{name}` must be a number: got {value}. {cure}".rstrip())
    if not (low <= value <= high and value < float("inf")):
        bounds = f"at least {low:g}" if high == float("inf") else f"in [{low:g}, {high:g}]"
        raise ConfigurationError(f"`{name}` must be {bounds}: got {value}. {cure}".rstrip())


def require_count(
    name: str, value: float, low: int, high: float = float("inf"), cure: str = ""
) -> None:
    """Raise unless ``value`` is a whole number in ``[low, high]``.

    Args:
        name: name of the setting, for the message.
        value: value of the setting.
        low: smallest value allowed.
        high: largest value allowed.
        cure: what the user can do, for the message.

    Raises:
        ConfigurationError: the value is not a whole number or lies outside the bounds.

    >>> require_count("every_n_steps", 10, 1)
    """
    require_between(name, value, low, high, cure)
    if not isinstance(value, int):
        raise ConfigurationError(f"`{name}` must be a whole number: got {value}. {cure}".rstrip())


def require_kind(name: str, value: object, kind: type, cure: str) -> None:
    """Raise unless a component built in Python is of a class; the parser checks YAML's classes.

    Args:
        name: name of the setting, for the message.
        value: value of the setting.
        kind: the class that the value must have.
        cure: what the user can do, for the message.

    Raises:
        ConfigurationError: the value is not an instance of ``kind``.
    """
    if not isinstance(value, kind):
        raise ConfigurationError(f"`{name}` must be a {kind.__name__}: got {value!r:.60}. {cure}")


class TrainingStopped(RuntimeError):  # noqa: N818
    """Raised if a run cannot continue; the message says why."""


class Interrupted(TrainingStopped):
    """Raised if a signal stops a run; the message says what is saved.

    Args:
        message: text for the user.
        number: number of the signal.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.number = int(number)


class BadRow(ConfigurationError):  # noqa: N818
    """Raised for a row of a prompt source that cannot be used; training draws another row instead.

    Attributes:
        wished: whether the user asked to drop such rows (``overlong_prompts: drop``).
    """

    def __init__(self, message: str, wished: bool = False) -> None:
        super().__init__(message)
        self.wished = wished


def disk_error(error: BaseException | None) -> OSError | None:
    """Return the first disk error in an error's chain of causes; None if there is none.

    >>> disk_error(PermissionError(13, "Permission denied"))
    PermissionError(13, 'Permission denied')
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK:
            return error
        error = error.__cause__ or error.__context__
    return None


def path_error(error: BaseException | None) -> ConfigurationError | None:
    """Return an error for the user if an impossible path caused ``error``, else None.

    >>> print(path_error(NotADirectoryError(20, "Not a directory", "run.yaml/x")))
    a path must be one that can exist: got Not a directory: run.yaml/x. Correct it in the settings.
    """
    while error is not None:
        words = ""
        if isinstance(error, OSError) and error.errno in PATH and error.filename is not None:
            words = f"{error.strerror}: {error.filename}"
        elif isinstance(error, ValueError) and str(error).startswith("embedded null"):
            words = str(error)
        if words:
            cure = "Correct it in the settings."
            return ConfigurationError(f"a path must be one that can exist: got {words}. {cure}")
        error = error.__cause__ or error.__context__
    return None


def load_library(module: str) -> Any:
    """Import and return a module of a library from the extra ``tasks``.

    Only this function imports those libraries.

    Raises:
        ConfigurationError: the library is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"`{module}` must be installed: got {error}. Run `pip install 'kdrl_lightning[tasks]'`."
        ) from error
