"""Checks that a value names a class of its setting's type.

Type hints whose name we read are typed ``Any``, as in jsonargparse.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, get_origin

from jsonargparse import Namespace

from kdrl_lightning.cli.settings.private import typehints, util
from kdrl_lightning.cli.settings.shapes import SPEC, is_class, is_spec
from kdrl_lightning.common.old_names import GONE

# Type -> what to write if a user gives the path of a model or data file in place of a class.
READS = {
    "Teacher": "{class_path: LocalTeacher, init_args: {model: %s}}",
    "PromptSource": "{class_path: HFPrompts, init_args: {path: %s}}",
}
DATA = {".jsonl", ".json", ".parquet", ".csv", ".arrow", ".txt"}
YAML = {".yaml", ".yml"}

NestedArg = util.NestedArg


def check_spec(val: object, members: Iterable[object]) -> None:
    """Check that all arguments of a class are below ``init_args``.

    Args:
        val: the value of a setting.
        members: the types for which the value can be meant.

    Raises:
        ValueError: an argument is next to ``class_path``, or ``init_args`` is misspelt.
    """
    kinds = [m for m in members if m is not NoneType]
    if not isinstance(val, Mapping | Namespace) or "class_path" not in val:
        return
    held = set(vars(val) if isinstance(val, Namespace) else val) - SPEC
    names = [name for name in held if not str(name).startswith("__")]  # jsonargparse adds these
    if not names or not kinds or not all(is_class(m) for m in kinds):
        return
    listed = ", ".join(f"`{name}`" for name in sorted(map(str, names)))
    near = [n for n in names if get_close_matches(str(n), SPEC, n=1, cutoff=0.8)]
    cure = "Did you mean `init_args`?" if near else "Write it below `init_args`."
    raise ValueError(
        f"must have its arguments below `init_args`: got {listed} next to `class_path`. {cure}"
    )


def nearest(name: str, names: Collection[str]) -> str | None:
    """Return the name most similar to another, preferring one that differs only in capitals.

    >>> nearest("Adamw", ["Adam", "AdamW", "SGD"])
    'AdamW'
    """
    found = get_close_matches(name, sorted(names), n=len(names) or 1)
    return next((n for n in found if n.lower() == name.lower()), found[0] if found else None)


def check_name(val: object, members: Iterable[object]) -> None:
    """Check that a class named without its module exists.

    Raises:
        ValueError: it does not; the message gives the nearest name.
    """
    name = val if isinstance(val, str) else None
    if isinstance(val, Mapping | Namespace):
        name = val.get("class_path")
    kinds = [m for m in members if m is not NoneType]
    if not isinstance(name, str) or not all(is_class(m) for m in kinds):
        return
    check_path(name, kinds)
    if "." in name or Path(name).is_file():  # such a file holds the class and its arguments
        return
    names = {path.rsplit(".", 1)[1] for m in kinds for path in class_paths(m)}
    if name in names or not names or "\n" in name:
        return
    close = nearest(name, names)
    cure = f"; did you mean {close}?" if close else ""
    cure = f", which is gone: {GONE[name]}" if name in GONE else cure
    wanted = " or ".join(_named(m) for m in kinds)
    raise ValueError(f"must be {wanted}, by name or import path: got {name}{cure}")


def check_path(name: str, kinds: Iterable[object]) -> None:
    """Refuse the path of a model or data file in place of a class.

    Raises:
        ValueError: the name is such a path; the message names the class that reads it.
    """
    for kind in kinds:
        cure = READS.get(getattr(kind, "__name__", ""))
        suffix = Path(name).suffix
        if cure and "\n" not in name and ("/" in name or suffix in DATA) and suffix not in YAML:
            raise ValueError(f"must be {_named(kind)}: got the path {name}. Write {cure % name}.")


def check_class_given(val: Any, members: Iterable[object], previous: object) -> None:
    """Check that a class is known before a flag sets one of its arguments.

    Raises:
        ValueError: no class is named yet.
    """
    kinds = [m for m in members if m is not NoneType]
    unknown = all(is_class(m) for m in kinds) and any(inspect.isabstract(m) for m in kinds)
    gives = isinstance(val, NestedArg) and val.key not in ("class_path", "__path__")
    if gives and unknown and not is_spec(previous):
        found = getattr(previous, "__name__", previous)
        raise ValueError(f"must name a class before its argument {val.key}: got {found}.")


def check_class_named(val: object, member: Any, previous: object) -> None:
    """Check that settings name a class if their type has several classes.

    Raises:
        ValueError: they name none, and jsonargparse would build the base class.
    """
    settings = isinstance(val, Mapping | Namespace) and "class_path" not in val
    if not settings or is_spec(previous) or not is_class(member):
        return
    if get_origin(member) is not None or len(class_paths(member)) > 1:
        function = "a function, or " if get_origin(member) is not None else ""
        kind = "" if function else f" of type {member.__name__}"
        raise ValueError(f"must name {function}a class{kind}: got arguments without `class_path`.")


def class_paths(member: Any) -> list[str]:
    """Return the import paths of a type's classes, including abstract ones."""
    if get_origin(member) is not None:
        return list(typehints.get_all_subclass_paths(member))
    return list(typehints.get_all_subclass_paths(member, include_abstract=True))


def _named(member: Any) -> str:
    return "a function" if get_origin(member) is not None else f"a {member.__name__}"
