"""Decides by the shape of a value which types of a union it can be meant for.

Values and types are typed ``Any``, as in jsonargparse.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from jsonargparse import Namespace

from kdrl_lightning.cli.settings.private import typehints, util
from kdrl_lightning.cli.settings.text import Text
from kdrl_lightning.common.untyped import Value

NULL = ("null", "~")
LEAVES = (str, int, float, bool, NoneType)
SPEC = {"class_path", "init_args", "dict_kwargs", "__path__"}
NestedArg = util.NestedArg


def fitting(members: Iterable[object], val: object, previous: Value, given: Value) -> list[Value]:
    """Return the members of a union that a value's shape allows; all of them if none does.

    Args:
        members: the union's types.
        val: the value.
        previous: the earlier value of the setting.
        given: the text on the command line from which ``val`` was read, if there is one.
    """
    known = list(members)
    kept = [m for m in known if fits(m, val, previous)]
    if isinstance(given, str) and not isinstance(val, str) and not is_spec(val) and str in known:
        kept = [m for m in known if m is str or m in kept]
    return kept or known


def fits(member: object, val: object, previous: Value) -> bool:
    """Return whether a value can be meant for a type.

    Args:
        member: the type.
        val: the value.
        previous: the earlier value of the setting.
    """
    if member is Any or isinstance(member, typehints.UnvalidatedType):
        return True
    kind = get_origin(member) or member
    mapping = inspect.isclass(kind) and issubclass(kind, Mapping)
    sequence = is_sequence(member)
    if val is None:
        return member is NoneType
    if isinstance(val, NestedArg):
        if is_spec(previous):
            return is_class(member)
        if sequence:  # an argument of the last class in a list
            return isinstance(previous, list) and any(is_class(m) for m in get_args(member))
        return mapping or is_class(member)
    if is_spec(val):
        return is_class(member)
    if isinstance(val, Mapping | Namespace):
        if is_spec(previous) and not by_name(val):  # arguments of the earlier class
            return is_class(member)
        return mapping or (is_class(member) and not inspect.isabstract(kind))
    if isinstance(val, list | tuple | set):
        return sequence
    if isinstance(val, str):
        if member is NoneType:
            return not isinstance(val, Text) and val.strip().lower() in NULL
        return not (mapping or sequence)
    if isinstance(val, bool | int | float):
        leaf = member in LEAVES and member is not NoneType
        return (leaf and (member is not bool or isinstance(val, bool))) or kind is Literal
    return True


def is_spec(val: object) -> bool:
    """Return whether a value is a class with arguments, or arguments of the earlier class."""
    if not isinstance(val, Mapping | Namespace):
        return False
    names = set(vars(val) if isinstance(val, Namespace) else val)
    return bool(names & {"class_path", "init_args"}) and names <= SPEC


def by_name(val: Mapping[str, object] | Namespace) -> bool:
    """Return whether every value of a mapping is a mapping, as for evaluation sets by name."""
    held = vars(val) if isinstance(val, Namespace) else val
    return bool(held) and all(isinstance(v, Mapping | Namespace) for v in held.values())


def same(one: Value, other: Value) -> bool:
    """Return whether two values are equal; YAML has lists in place of tuples.

    >>> same((0.9, 0.999), [0.9, 0.999]), same(1, 2)
    (True, False)
    """
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return list(one) == list(other)
    return bool(one == other)


def not_default(kind: Callable[..., Any], arguments: Mapping[str, object]) -> list[str]:
    """Return the names of arguments whose value is not their default in the class's signature.

    A saved configuration has all arguments, also those that the user never wrote.
    """
    known = inspect.signature(kind).parameters
    return [n for n, v in arguments.items() if n not in known or not same(known[n].default, v)]


def is_sequence(member: object) -> bool:
    """Return whether a type is a list, tuple or set."""
    kind = get_origin(member) or member
    return kind in typehints.sequence_origin_types | typehints.tuple_set_origin_types


def is_class(member: object) -> bool:
    """Return whether a value of this type is given as a class name with arguments."""
    kind = get_origin(member) or member
    if kind is Callable or kind in typehints.callable_origin_types:
        return True
    return (
        inspect.isclass(kind)
        and kind not in typehints.root_types | set(LEAVES)
        and not issubclass(kind, Mapping | list | tuple | set | frozenset | str)
        and typehints.ActionTypeHint.is_subclass_typehint(kind, also_closed=True)
    )
