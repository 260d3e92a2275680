"""Calls functions through ``torch.compile``, or uncompiled if the compiler fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch

# `Any`: what torch.compile takes and returns.


class OrPlain:
    """Calls a function through ``torch.compile``; if that fails, warns and calls it uncompiled.

    Args:
        function: what to call; a second call must do no harm, because it runs again if its compiled
            form fails.
        part: what the function belongs to, for the warning. If one function of a part fails, all
            of them run uncompiled, without a second warning.

    Attributes:
        failed: parts on which the compiler failed.
    """

    failed: ClassVar[set[str]] = set()

    def __init__(self, function: Callable[..., Any], part: str) -> None:
        self.function = function
        self.part = part
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns."""
        if self.part not in OrPlain.failed:
            try:
                if self._compiled is None:
                    self._compiled = torch.compile(self.function, dynamic=True)
                return self._compiled(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a compiler fails with errors of many types
                OrPlain.failed.add(self.part)
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                warnings.warn(
                    f"torch.compile failed on {self.part}: {reason}. This part runs without it, "
                    "which is slower. Install what is missing, e.g. triton.",
                    stacklevel=2,
                )
        return self.function(*args, **kwargs)
