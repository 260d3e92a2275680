"""Notes what is lost when a new value replaces a list, a mapping or a class.

Actions and values are typed ``Any``, as in jsonargparse.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pydoc import ErrorDuringImport, locate
from typing import Any, NamedTuple

from jsonargparse import Namespace

from kdrl_lightning.cli.settings.shapes import is_spec, not_default
from kdrl_lightning.cli.settings.unused import note_replaced
from kdrl_lightning.common.untyped import Tree, Value


class Given(NamedTuple):
    """Name of a class in a list, with the names of the arguments that it is given."""

    name: str
    arguments: tuple[str, ...]


def note_lost(
    where: str, before: object, had: Any, after: object, what: str = "an earlier value"
) -> None:
    """Note which parts of an earlier value are lost, unless the new value is null or false.

    Args:
        where: name of the setting.
        before: the earlier value.
        had: its contents, see ``held``, taken before jsonargparse changed them.
        after: the new value.
        what: description of the earlier value, for users.
    """
    if not had or after is None or after is False:
        return
    has = contents(after)
    classes = has if isinstance(has, list) else []
    cure = ""
    if isinstance(had, Mapping):
        others = has if isinstance(has, dict) else {}
        lost = [f"`{name}`" for name in had if name not in others]
        cure = "Repeat it to keep it." if others else ""
    elif is_spec(before) and not (classes and isinstance(after, list)):
        if is_spec(after):
            return  # `discard` notes which arguments are lost
        lost = missing(had, [Given(had[0].name, ())])
    elif _rows(before) and _rows(after):
        return
    else:
        lost = missing(had, classes)
        if not _rows(before) and (classes or isinstance(after, list)):
            cure = f"Write `{where.rsplit('.', 1)[-1]}+` to add to the list."
    note_replaced(where, what, lost, cure)


def held(value: Any) -> list[Given] | dict[str, Any] | None:
    """Return the contents of a value: for a class its ``chosen`` arguments, for rows a count."""
    if is_spec(value):
        return [Given(str(value.get("class_path")).rsplit(".", 1)[-1], tuple(chosen(value)))]
    found = contents(value)
    return [Given(f"each of its {len(value)} rows", ())] if not found and _rows(value) else found


def _rows(value: object) -> bool:
    """Return whether a value is a list of mappings that are not classes."""
    return isinstance(value, list) and any(
        isinstance(one, Mapping | Namespace) and not is_spec(one) for one in value
    )


def chosen(spec: Any, without: Collection[str] = ()) -> list[str]:
    """Return the names of a class's arguments that differ from their defaults.

    Args:
        spec: class and arguments.
        without: names to leave out.
    """
    given = {name: value for name, value in _arguments(spec).items() if name not in without}
    try:
        kind = locate(str(spec.get("class_path"))) if given else None  # this imports torch
        return not_default(kind, given) if callable(kind) else list(given)
    except (ErrorDuringImport, TypeError, ValueError):  # the last two: it has no signature
        return list(given)


def contents(value: Value) -> list[Given] | Tree | None:
    """Return the classes in a list, a single class as a list of one, or a mapping as a dict.

    >>> contents([{"class_path": "a.B", "init_args": {"x": 1}}, "C", 3])
    [Given(name='B', arguments=('x',)), Given(name='C', arguments=())]
    """
    if is_spec(value) or is_name(value):
        value = [value]
    if isinstance(value, Mapping):
        return dict(value)
    if not isinstance(value, list | tuple):
        return None
    return [_given(item) for item in value if is_spec(item) or is_name(item)]


def missing(had: list[Given], has: list[Given]) -> list[str]:
    """Return, as text, the classes and arguments of classes that the second list lacks.

    >>> missing([Given("A", ("x", "y")), Given("B", ()), Given("B", ())], contents(["A", "B"]))
    ['`x`, `y` of A', 'B']
    """
    rest, lost = list(has), []
    for one in had:
        found = next((other for other in rest if other.name == one.name), None)
        if found is None:
            lost.append(one.name)
            continue
        rest.remove(found)
        gone = [f"`{name}`" for name in one.arguments if name not in found.arguments]
        if gone:
            lost.append(f"{', '.join(gone)} of {one.name}")
    return lost


def is_name(item: object) -> bool:
    """Return whether a value can be a class name: its last part starts with a capital."""
    last = item.rsplit(".", 1)[-1] if isinstance(item, str) else ""
    return last.isidentifier() and last[0].isupper()


def _given(item: Any) -> Given:
    if isinstance(item, str):
        return Given(item.rsplit(".", 1)[-1], ())
    return Given(str(item.get("class_path")).rsplit(".", 1)[-1], tuple(_arguments(item)))


def _arguments(spec: Any) -> Tree:
    found = spec.get("init_args") or {}
    return dict(vars(found) if isinstance(found, Namespace) else found)


def is_default(value: Value, default: Any) -> bool:
    """Return whether a value is the default, or the default class with more arguments."""
    if is_spec(value) and is_spec(default) and value["class_path"] == default["class_path"]:
        return _arguments(default).items() <= _arguments(value).items()
    return bool(value == default)
