"""The one exception for a user's mistake: the command line prints it as a single line."""

from __future__ import annotations

import errno
import signal
from importlib import import_module
from typing import Any

# What a disk does to whatever happens to write: full, over the quota, read-only, not permitted.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}
# What it says of a path that cannot be.
PATH = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}


class ConfigurationError(ValueError):
    """A value that cannot work; the message names the value, the rule and the cure."""


def require_between(name: str, value: float, low: float, high: float, cure: str = "") -> None:
    """Raise unless ``low <= value <= high`` (NaN and infinity fail too).

    >>> require_between("trrd_alpha", 0.5, 0.0, 1.0)
    """
    if not isinstance(value, int | float):
        raise ConfigurationError(f"`{name}` must be a number: got {value}. {cure}".rstrip())
    if not (low <= value <= high and value < float("inf")):
        bounds = f"at least {low:g}" if high == float("inf") else f"in [{low:g}, {high:g}]"
        raise ConfigurationError(f"`{name}` must be {bounds}: got {value}. {cure}".rstrip())


class TrainingStopped(RuntimeError):  # noqa: N818
    """A run that cannot go on; the message says at which step and why."""


class Interrupted(TrainingStopped):
    """A run that a signal stopped; the message says what is saved.

    Args:
        message: for the user.
        number: of the signal.
    """

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.number = int(number)


class BadRow(ConfigurationError):  # noqa: N818
    """A row of a prompt source that cannot be used; a run that draws it takes another one.

    Attributes:
        wished: the user chose to leave such rows out (``overlong_prompts: drop``).
    """

    def __init__(self, message: str, wished: bool = False) -> None:
        super().__init__(message)
        self.wished = wished


def disk_error(error: BaseException | None) -> OSError | None:
    """Return the disk's failure among an error and its causes.

    >>> disk_error(PermissionError(13, "Permission denied"))
    PermissionError(13, 'Permission denied')
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK:
            return error
        error = error.__cause__ or error.__context__
    return None


def path_error(error: BaseException | None) -> ConfigurationError | None:
    """Return the user's mistake of a path that no file can have, among an error and its causes.

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
    """Import a library of the extra ``tasks``, or a module of one; only this function imports them.

    Raises:
        ConfigurationError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"`{module}` must be installed: got {error}. Run `pip install 'kdrl_lightning[tasks]'`."
        ) from error
