"""Protects transformers' classes from vLLM, which changes them.

If vLLM has no code of its own for an architecture, it runs transformers' classes, and changes the
base, ``__init__`` and ``__call__`` of the decoder's class. The student is an instance of the same
class, so its next forward pass would fail. We undo the changes and move them to copies of the
classes, which only the engine's model uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# `Any`: members of a class that vLLM changed.

# Attributes that Python or a library sets on a class at its first use.
INCIDENTAL = {"__abstractmethods__", "_abc_impl", "__doc__", "__dict__", "__weakref__"}


class Changes:
    """Records changes of model and configuration classes since this object was made."""

    def __init__(self) -> None:
        from transformers import PreTrainedConfig

        self._before = {
            kind: (kind.__bases__, dict(vars(kind)))
            for root in (nn.Module, PreTrainedConfig)
            for kind in _subclasses(root)
            if not kind.__module__.startswith("vllm.")
        }
        self._changed: dict[type, tuple[tuple[type, ...], dict[str, Any]]] = {}

    def undo(self) -> None:
        """Restore the bases and attributes of every class."""
        for kind, (bases, attributes) in self._before.items():
            now = dict(vars(kind))
            new = {
                name: value
                for name, value in now.items()
                if name not in INCIDENTAL and attributes.get(name, _MISSING) is not value
            }
            gone = [n for n in attributes if n not in now and n not in INCIDENTAL]
            if not new and not gone and kind.__bases__ == bases:
                continue
            self._changed[kind] = (tuple(b for b in kind.__bases__ if b not in bases), new)
            kind.__bases__ = bases
            for name in new:
                if name not in attributes:
                    delattr(kind, name)
            for name in [*(n for n in new if n in attributes), *gone]:
                setattr(kind, name, attributes[name])

    def give(self, model: nn.Module) -> None:
        """Apply the undone changes to one model, in copies of its classes."""
        copies: dict[type, type] = {}
        for module in model.modules():
            kind = type(module)
            if kind not in copies:
                copies[kind] = self._copy(kind)
            if copies[kind] is not kind:
                module.__class__ = copies[kind]

    def _copy(self, kind: type) -> type:
        inherited = [self._changed[k] for k in reversed(kind.__mro__) if k in self._changed]
        if not inherited:
            return kind
        attributes = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        bases: list[type] = [kind]
        for added, changed in inherited:
            bases += [b for b in added if b not in bases]
            attributes |= changed
        return type(kind.__name__, tuple(bases), attributes)


@contextmanager
def classes_kept() -> Iterator[Callable[[nn.Module], None]]:
    """Undo on exit all changes to the classes of models and configurations.

    Yields:
        A function. A model that you pass to it keeps the changed classes.
    """
    changes = Changes()
    models: list[nn.Module] = []
    try:
        yield models.append
    finally:
        changes.undo()
        for model in models:
            changes.give(model)


_MISSING = object()


def _subclasses(kind: type) -> Iterator[type]:
    seen: set[type] = set()
    rest = [kind]
    while rest:
        one = rest.pop()
        if one not in seen:
            seen.add(one)
            yield one
            rest += one.__subclasses__()
