"""Which objects can be called with samples, and how another process gets one."""

from __future__ import annotations

import functools
import inspect
import pickle
import pickletools
import sys
from collections.abc import Callable
from typing import Any

from kdrl_lightning.errors import ConfigurationError

HERE = "Put it at the top level of a module, or set `time_limit_s: null`."


def require_callable(name: str, function: Any) -> None:
    """Make sure that an object can be called with one argument and returns a result at once.

    Functions, partials, bound methods and objects with ``__call__`` can.

    Raises:
        ConfigurationError: it is a class, asynchronous, a generator, takes another number of
            arguments, or is no function at all.
    """
    shown = describe(function)
    if inspect.isclass(function):
        raise ConfigurationError(
            f"`{name}` must be a function or an object: got the class {shown}. Make an object of "
            f"it: {function.__name__}()."
        )
    if not callable(function):
        raise ConfigurationError(
            f"`{name}` must be a function of one sample: got {function!r:.100}. Give a function, "
            "or an object with `__call__`."
        )
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    forms = [inner, getattr(type(inner), "__call__", None)]  # noqa: B004 (the function itself)
    if any(inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f) for f in forms):
        raise ConfigurationError(
            f"`{name}` must return its result at once: got the asynchronous function {shown}. "
            "Wrap it: lambda sample: asyncio.run(function(sample)), as a function of your module."
        )
    if any(inspect.isgeneratorfunction(f) for f in forms):
        raise ConfigurationError(
            f"`{name}` must return its result: got {shown}, which yields. Return a number."
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    try:
        signature.bind(None)
    except TypeError:
        raise ConfigurationError(
            f"`{name}` must take one argument, the sample: got {shown}{signature}. Give the others "
            "a default, or bind them with functools.partial."
        ) from None


def portable_target(function: Callable[[Any], Any]) -> tuple[str | None, Any]:
    """Return how another process finds a function: module and name, or else None and a pickle.

    Raises:
        ConfigurationError: it cannot be had there: a lambda, a nested function, one of the user's
            main module, or an object that cannot be pickled.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if module == "__main__" or "<" in str(name):
        raise _not_importable(function, "")
    found: Any = sys.modules.get(str(module))
    for part in str(name).split("."):
        found = getattr(found, part, None)
    if found is function and not inspect.ismethod(function):
        return module, name
    try:
        data = pickle.dumps(function)
    except Exception as error:
        raise _not_importable(function, f" ({error})") from error
    if any(argument == "__main__" for _, argument, _ in pickletools.genops(data)):
        raise _not_importable(function, " (it needs your main module)")
    return None, data


def describe(function: Any) -> str:
    """Return a function's name, or what kind of object it is."""
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else f"{type(function).__name__} object"


def _not_importable(function: Any, why: str) -> ConfigurationError:
    module = getattr(function, "__module__", None)
    shown = f"{module}.{describe(function)}" if isinstance(module, str) else describe(function)
    return ConfigurationError(
        f"`function` must be one that another process can import: got {shown}{why}. {HERE}"
    )
