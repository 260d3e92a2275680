"""Notes what is lost when a list of classes, or a mapping by name, is replaced.

Actions and values are ``Any``, as in jsonargparse.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

from jsonargparse import Namespace

from kdrl_lightning.cli.settings.private import actions, typehints
from kdrl_lightning.cli.settings.shapes import is_spec
from kdrl_lightning.cli.settings.unused import note_replaced
from kdrl_lightning.common.untyped import Tree, Value

_load_group = actions._ActionConfigLoad.__call__
_check_type = typehints.ActionTypeHint._check_type
# Inside a class, jsonargparse knows only the last part of a setting's name.
_groups: ContextVar[tuple[str, ...]] = ContextVar("groups", default=())


class Given(NamedTuple):
    """Name of a class in a list, with the names of its arguments."""

    name: str
    arguments: tuple[str, ...]


def check_type(
    self: Any, value: Value, append: bool = False, cfg: Any = None, mode: Any = None
) -> Any:
    """Return a value as ``ActionTypeHint._check_type`` does; note what it replaces."""
    before = cfg.get(self.dest) if cfg else None
    had = None if _is_default(before, self.default) else contents(before)
    token = _groups.set((*_groups.get(), self.dest))
    try:
        made = _check_type(self, value, append=append, cfg=cfg, mode=mode)
        if had is not None and not typehints.sub_defaults.get():
            note_lost(".".join(_groups.get()), before, had, made)
    finally:
        _groups.reset(token)
    return made


def load_group(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Read a file of a group, e.g. ``--trainer=trainer.yaml``; note what it replaces."""
    if not args:  # jsonargparse is creating the action
        return _load_group(self, **kwargs)
    parser, namespace = args[:2]
    defaults = {action.dest: action.default for action in parser._actions}
    before = namespace.get(self.dest)
    held = [] if before is None else list(before.items(branches=True))
    had = [(f"{self.dest}.{key}", value, contents(value)) for key, value in held]
    made = _load_group(self, *args, **kwargs)
    for key, value, inside in had:
        if not _is_default(value, defaults.get(key)):
            where = key.replace(".init_args", "")
            note_lost(where, value, inside, namespace.get(key), "an earlier value")
    return made


def note_lost(
    where: str, before: Any, had: Any, after: Any, what: str = "an earlier value"
) -> None:
    """Note what is lost of an earlier value; only lists and mappings by name lose anything.

    Args:
        where: name of the setting.
        before: the earlier value.
        had: its ``contents``, taken before jsonargparse changed it.
        after: the new value.
        what: description of the earlier value, for users.
    """
    has = contents(after)
    last = where.rsplit(".", 1)[-1]
    if isinstance(had, dict) and isinstance(has, dict):
        lost = [f"`{name}`" for name in had if name not in has]
        note_replaced(where, what, lost, "Repeat it to keep it.")
    elif isinstance(had, list) and isinstance(has, list) and list in (type(before), type(after)):
        if isinstance(after, list) and after and not has and not isinstance(before, list):
            return  # rows in place of a class that reads them
        cure = f"Write `{last}+` to add to the list."
        note_replaced(where, what, missing(had, has), cure)


def contents(value: Value) -> list[Given] | Tree | None:
    """Return the classes in a list, or a single class in a list; a mapping by name as it is.

    >>> contents([{"class_path": "a.B", "init_args": {"x": 1}}, "C", 3])
    [Given(name='B', arguments=('x',)), Given(name='C', arguments=())]
    """
    if is_spec(value) or _is_name(value):
        value = [value]
    if isinstance(value, Mapping):
        return dict(value)
    if not isinstance(value, list | tuple):
        return None
    return [_given(item) for item in value if is_spec(item) or _is_name(item)]


def missing(had: list[Given], has: list[Given]) -> list[str]:
    """Return the classes, and arguments of classes, that are not in the second list.

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


def _is_name(item: Any) -> bool:
    """Return whether a text can name a class; names of columns or modules cannot."""
    last = item.rsplit(".", 1)[-1] if isinstance(item, str) else ""
    return last.isidentifier() and last[0].isupper()


def _given(item: Any) -> Given:
    if isinstance(item, str):
        return Given(item.rsplit(".", 1)[-1], ())
    return Given(str(item.get("class_path")).rsplit(".", 1)[-1], tuple(_arguments(item)))


def _arguments(spec: Any) -> Tree:
    found = spec.get("init_args") or {}
    return dict(vars(found) if isinstance(found, Namespace) else found)


def _is_default(value: Value, default: Any) -> bool:
    if is_spec(value) and is_spec(default) and value["class_path"] == default["class_path"]:
        return _arguments(default).items() <= _arguments(value).items()
    return bool(value == default)
