"""Checks values of a base file that a later file replaces, because jsonargparse never sees them.

Values and actions are typed ``Any``, as in jsonargparse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from typing import Any, NamedTuple

from kdrl_lightning.common.untyped import Value

# Layers that we have read and the parser has not checked yet.
_read: list[Layer] = []


class Layer(NamedTuple):
    """The settings of a base file (``below``), and those that are merged over them (``over``)."""

    file: str
    below: Mapping[str, Any]
    over: Mapping[str, Any]


def keep(layer: Layer) -> None:
    """Store a layer until the parser checks it, see ``mistakes``."""
    _read.append(layer)


def forget() -> None:
    """Remove the stored layers."""
    _read.clear()


def mistakes(actions: Iterable[Any]) -> list[tuple[str, Exception]]:
    """Return (file, error) for each replaced value that is invalid, and remove the layers.

    Args:
        actions: the actions of the parser that reads the files.
    """
    found = []
    for action in actions if _read else ():
        for file, below, over in _read if hasattr(action, "_typehint") else ():
            value = _at(below, action.dest)
            # If a class replaces a mapping, `merge` has noted it.
            partial = isinstance(value, Mapping) and "class_path" not in value
            if value is None or _at(over, action.dest) in (None, value) or partial:
                continue
            try:
                action._check_type_(deepcopy(value))
            except Exception as error:  # a class may be any code
                if "required" not in str(error):  # a later file gives it
                    found.append((file, error))
    forget()
    return found


def overruled(words: Sequence[str], read: Callable[[str], Any]) -> Iterator[tuple[str, str]]:
    """Yield (flag, file) for each flag that a later ``--config`` file sets, too: the file wins.

    Args:
        words: the command line.
        read: returns the settings of a value of ``--config``.

    >>> list(overruled(["--a.b=1", "--config", "x.yaml", "--a.c=2"], lambda _: {"a": {"b": 3}}))
    [('--a.b', 'x.yaml')]
    """
    flags: list[str] = []
    for i, word in enumerate(words):
        name, given, value = word.partition("=")
        if name != "--config":
            flags += [name] if name.startswith("--") and not name.endswith("+") else []
        elif flags and (given or words[i + 1 :]):
            file = value if given else words[i + 1]
            settings = read(file)
            for flag in dict.fromkeys(flags):
                if _at(settings, flag[2:]) is not None:
                    yield flag, file


def _at(tree: Value, name: str) -> Value:
    with suppress(KeyError, TypeError):
        for key in name.split("."):
            tree = tree[key]
        return tree
    return None
