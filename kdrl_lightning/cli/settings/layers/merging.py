"""Merges the settings of a file over those of its ``base``."""

from __future__ import annotations

import inspect
from pydoc import ErrorDuringImport, locate
from typing import Any

from kdrl_lightning.cli.settings.layers.replaced import chosen, contents, held, is_name, note_lost
from kdrl_lightning.cli.settings.shapes import by_name, is_spec
from kdrl_lightning.cli.settings.unused import note_dropped, note_replaced

CLASS = {"class_path", "init_args", "dict_kwargs"}


# `Any` in this file: a YAML document, as PyYAML types it.
def merge(base: Any, over: Any, where: str = "") -> Any:
    """Return ``over`` merged into ``base``: mappings key by key, anything else replaced.

    A mapping without ``class_path`` that is merged over a class gives arguments of this class, as
    with two files on the command line. A different ``class_path`` replaces the class with all its
    arguments; if ``base`` has only ``init_args``, they go to the class of ``over``. A mapping whose
    keys are no arguments of the class, e.g. names of evaluation sets, also replaces it. A list
    under ``name+`` is appended to the list of ``base``.

    Args:
        base: the settings of a base file.
        over: the settings of the file that names this base.
        where: name of the setting; empty for the whole file.

    >>> merge({"a": {"x": 1, "y": 2}, "b": [1], "c": [1]}, {"a": {"y": 3}, "b": [2], "c+": [2]})
    {'a': {'x': 1, 'y': 3}, 'b': [2], 'c': [1, 2]}
    >>> merge({"class_path": "SGD", "init_args": {"lr": 1, "momentum": 0.9}}, {"lr": 2})
    {'class_path': 'SGD', 'init_args': {'lr': 2, 'momentum': 0.9}}
    """
    base = _class_for(base, over)
    if isinstance(base, dict) and "class_path" in base and isinstance(over, str):
        if _same(base["class_path"], over):
            return base
        if is_name(over):
            note_dropped(where, chosen(base), str(base["class_path"]), over)
            return over
    if over is None and "." not in where and isinstance(base, dict) and "class_path" not in base:
        return base  # all lines of the group are comments
    if not isinstance(base, dict) or not isinstance(over, dict):
        _note_lost(where, base, over)
        return over
    if "class_path" in over and "class_path" not in base and not set(base) <= CLASS:
        names = [f"`{name}`" for name in base]
        note_replaced(where, "the settings of its base", names, "Write them below `init_args`.")
        return over
    named = over.get("class_path")
    if named is not None and not _same(base.get("class_path", named), named):
        lost = chosen(base, without=over.get("init_args") or {})
        note_dropped(where, lost, str(base.get("class_path")), str(named))
        return over
    if "class_path" in base and not set(over) <= CLASS:
        if named is not None or not _are_arguments(base, over):
            _note_lost(where, base, over)
            return over
        over = {"init_args": over}
    return _merged(base, over, where)


def _merged(base: dict[Any, Any], over: dict[Any, Any], where: str) -> dict[Any, Any]:
    """Return two mappings merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        path = where if key == "init_args" else f"{where}.{key}" if where else str(key)
        longer = key.removesuffix("+") if isinstance(key, str) and key.endswith("+") else None
        if longer is None:
            had = base.get(key)
            added = merged.pop(f"{key}+", None)
            had = had if added is None else [*_items(had), *_items(added)]
            if key != "init_args" or value is not None:  # None: all its lines are comments
                merged[key] = merge(had, value, path)
        else:
            place = longer if longer in merged else key
            merged[place] = [*_items(merged.get(place)), *_items(value)]
    return merged


def _class_for(base: Any, over: Any) -> Any:
    """Return a class name as ``class_path``, if ``over`` gives its arguments; else the base."""
    arguments = isinstance(over, dict) and "class_path" not in over
    if isinstance(base, str) and is_name(base) and arguments and not by_name(over):
        return {"class_path": base}
    return base


def _are_arguments(base: dict[str, Any], over: dict[str, Any]) -> bool:
    """Return whether the keys of ``over`` are arguments of the base's class.

    If all values are mappings, the keys may also be names, e.g. of evaluation sets.
    """
    if not by_name(over) or set(over) & set(base.get("init_args") or {}):
        return True
    try:
        kind: Any = locate(str(base["class_path"]))
        return callable(kind) and set(over) <= set(inspect.signature(kind).parameters)
    except (ErrorDuringImport, TypeError, ValueError):  # the last two: it has no signature
        return False


def _same(one: object, other: object) -> bool:
    """Return whether two names mean the same class; a name may lack its module."""
    if one == other or not (isinstance(one, str) and isinstance(other, str)):
        return bool(one == other)
    if one.rsplit(".", 1)[-1] != other.rsplit(".", 1)[-1]:
        return False
    if "." not in one or "." not in other:
        return True
    try:
        found = locate(one), locate(other)
    except ErrorDuringImport:
        return False
    return found[0] is not None and found[0] is found[1]


def _note_lost(where: str, base: object, over: object) -> None:
    # A single class counts as a list of one.
    listed = isinstance(over, list) and is_spec(base) and contents(over)
    kind = "list" if isinstance(base, list) or listed else "settings"
    note_lost(where, base, held(base), over, f"the {kind} of its base")


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
