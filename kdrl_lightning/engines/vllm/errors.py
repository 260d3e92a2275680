"""Turns an error of vLLM into one line with the reason and a cure."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from kdrl_lightning.errors import ConfigurationError, TrainingStopped

MISSING = re.compile(r"No module named '(\w+)")
# vLLM inspects a model's code in another process, and only that process's log has the reason.
UNSAID = re.compile(r"\['(\w+)'.*\] failed to be inspected")
KNOWN = re.compile(r" Supported architectures: .*")  # vLLM lists about 300

Importer = Callable[[str], Exception | None]


def failure(
    error: Exception, what: str, path: str, sampled: bool, import_error: Importer
) -> Exception:
    """Return the one-line error to raise if vLLM fails in this process.

    If vLLM has never sampled, it cannot run the model (``ConfigurationError``); else it broke
    during the run (``TrainingStopped``).

    Args:
        error: the error that vLLM raised.
        what: what vLLM had to do, as in ``sample``.
        path: folder or hub name of the model.
        sampled: whether the engine has sampled before.
        import_error: see ``reason_and_cure``.

    >>> print(failure(ValueError("no memory"), "sample", "m", True, lambda name: None))
    vLLM could not sample: ValueError: no memory. Resume the run from its last checkpoint.
    """
    if sampled:
        return TrainingStopped(
            f"vLLM could not {what}: {described(error)}. Resume the run from its last checkpoint."
        )
    reason, cure = reason_and_cure(error, import_error)
    return ConfigurationError(
        f"`rollout_engine` must be an engine that can run {path}: got VLLMEngine, which could not "
        f"{what}: {reason}. {cure}, or use TransformersEngine."
    )


def described(error: BaseException) -> str:
    """Return an error's message, with type and line of code if no ``raise`` statement raised it.

    An assertion often has no message, and Python's messages do not say what they are about.
    """
    text = KNOWN.sub("", short(error)).rstrip(".")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.line]
    if hasattr(error, "errors") or (frames and str(frames[-1].line).startswith("raise ")):
        return text
    kind = type(error).__name__
    text = text if text == kind else f"{kind}: {text}"
    # The code that calls torch or a look-up such as `__getattr__` says more than their frames.
    callers = [
        frame
        for frame in frames
        if "torch" not in Path(frame.filename).parts and not frame.name.startswith("__get")
    ] or frames
    if not callers:
        return text
    place = callers[-1]
    before, _, file = place.filename.rpartition("site-packages/")
    return f"{text}, at `{place.line}` ({file if before else Path(file).name}:{place.lineno})"


def short(error: BaseException) -> str:
    """Return the message of an error in one line of at most about 300 characters."""
    text = str(error)
    if hasattr(error, "errors"):  # pydantic surrounds the message with other lines
        text = "; ".join(str(found.get("msg", found)) for found in error.errors())
    text = " ".join(text.removeprefix("Value error, ").split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def reason_and_cure(error: Exception, import_error: Importer) -> tuple[str, str]:
    """Return why vLLM cannot run a model, and what the user can do.

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
    return described(found), "Check vLLM's versions and memory"


def missing_package(error: BaseException) -> str:
    """Return the missing package that caused an error; "" if no package is missing."""
    for cause in causes(error):
        named = MISSING.search(str(cause))
        name = getattr(cause, "name", None) or (named[1] if named else "")
        package = str(name).partition(".")[0]
        import_failed = isinstance(cause, ImportError) or named
        if import_failed and package and find_spec(package) is None:
            return package
    return ""


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, the error that caused it, and so on."""
    seen: set[int] = set()
    rest: BaseException | None = error
    while rest is not None and id(rest) not in seen:
        seen.add(id(rest))
        yield rest
        rest = rest.__cause__ or rest.__context__
