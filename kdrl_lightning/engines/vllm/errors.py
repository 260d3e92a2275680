"""Finds, in one line, the reason why vLLM did not start."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec

MISSING = re.compile(r"No module named '(\w+)")
# vLLM inspects a model's code in another process and leaves the reason in that process's log.
UNSAID = re.compile(r"\['(\w+)'.*\] failed to be inspected")


def short(error: BaseException) -> str:
    """Return the message of an error in one line of at most about 300 characters."""
    text = str(error)
    if hasattr(error, "errors"):  # pydantic's text surrounds the rule with other lines
        text = "; ".join(str(found.get("msg", found)) for found in error.errors())
    text = " ".join(text.removeprefix("Value error, ").split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def reason_and_cure(
    error: Exception, import_error: Callable[[str], Exception | None]
) -> tuple[str, str]:
    """Return why vLLM did not start, and what the user can do.

    If vLLM's code for the architecture needs a package that is not installed, the reason names it.

    Args:
        error: the error that vLLM raised.
        import_error: imports vLLM's code for an architecture and returns the error, or None.
    """
    unsaid = UNSAID.search(str(error))
    found = (import_error(unsaid[1]) if unsaid else None) or error
    package = missing_package(found)
    if package:
        return (
            f"its code for this architecture needs the package {package}, which is not installed",
            f"Install {package} in the version that fits your torch",
        )
    return short(found).rstrip("."), "Check vLLM's versions and memory"


def missing_package(error: BaseException) -> str:
    """Return the missing package that caused an error; an empty text if no package is missing."""
    for cause in causes(error):
        named = MISSING.search(str(cause))
        name = getattr(cause, "name", None) or (named[1] if named else "")
        package = str(name).partition(".")[0]
        import_failed = isinstance(cause, ImportError) or named
        if import_failed and package and find_spec(package) is None:
            return package
    return ""


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and, one after the other, the errors that caused it."""
    seen: set[int] = set()
    rest: BaseException | None = error
    while rest is not None and id(rest) not in seen:
        seen.add(id(rest))
        yield rest
        rest = rest.__cause__ or rest.__context__
