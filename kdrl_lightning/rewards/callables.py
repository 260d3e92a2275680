"""Checks that a reward can be called, and says how another process can load it."""

from __future__ import annotations

import functools
import inspect
import pickle
import pickletools
import sys
from collections.abc import Callable
from typing import Any

from kdrl_lightning.errors import ConfigurationError

# `Any`: users' functions.

HERE = "Put it at the top level of a module, or set `time_limit_s: null`."


def require_callable(name: str, function: object) -> None:
    """Refuse an object that cannot be called with one argument, or does not return a result.

    Functions, partials, bound methods and objects with ``__call__`` are accepted.

    Args:
        name: the setting that names the object, for error messages.
        function: the object.

    Raises:
        ConfigurationError: the object is a class, asynchronous or a generator, takes another number
            of arguments, or cannot be called.
    """
    shown = describe(function)
    if inspect.isclass(function):
        raise ConfigurationError(
            f"`{name}` must be a function or an object: got the class {shown}. Create an object of "
            f"it: {function.__name__}()."
        )
    if not callable(function):
        raise ConfigurationError(
            f"`{name}` must be a function of one sample: got {function!r:.100}. Give a function, "
            "or an object with `__call__`."
        )
    inner: object = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    forms = [inner, getattr(type(inner), "__call__", None)]  # noqa: B004 (the function itself)
    if any(inspect.iscoroutinefunction(f) or inspect.isasyncgenfunction(f) for f in forms):
        raise ConfigurationError(
            f"`{name}` must not be asynchronous: got {shown}. Define a function in your module "
            "that returns asyncio.run(function(sample))."
        )
    if any(inspect.isgeneratorfunction(f) for f in forms):
        raise ConfigurationError(
            f"`{name}` must return its result: got the generator {shown}. Return a number."
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    try:
        signature.bind(None)
    except TypeError:
        raise ConfigurationError(
            f"`{name}` must take one argument, the sample: got {shown}{signature}. Give the other "
            "arguments defaults, or bind them with functools.partial."
        ) from None


def portable_target(function: Callable[[Any], Any]) -> tuple[str | None, Any]:
    """Return how another process can load a function: its module and name, or None and a pickle.

    Raises:
        ConfigurationError: another process cannot load it: a lambda, a nested function, a function
            of the user's main module, or an object that cannot be pickled.
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


def describe(function: object) -> str:
    """Return a function's name, or an object's class, for messages."""
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else f"{type(function).__name__} object"


def _not_importable(function: object, why: str) -> ConfigurationError:
    module = getattr(function, "__module__", None)
    shown = f"{module}.{describe(function)}" if isinstance(module, str) else describe(function)
    return ConfigurationError(
        f"`function` must be importable from another process: got {shown}{why}. {HERE}"
    )
