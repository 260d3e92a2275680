"""Reports a single cause for a mistake in a value that may have several types.

jsonargparse tries every type of a union and reports the errors of all. The shape of a value shows
which type it is meant for: a mapping for a class, a list for a sequence. This module removes the
other types before jsonargparse tries them; otherwise a misspelt argument of a prompt source would
become a data set with a column of that name.

Values and type hints are typed ``Any``, as in jsonargparse.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from jsonargparse import Namespace, add_instantiator

from kdrl_lightning.cli.settings.classes import (
    check_class_given,
    check_class_named,
    check_name,
    check_spec,
)
from kdrl_lightning.cli.settings.layers.files import check_type, load_group
from kdrl_lightning.cli.settings.private import actions, typehints, util
from kdrl_lightning.cli.settings.shapes import (
    LEAVES,
    NULL,
    fitting,
    is_class,
    is_sequence,
    is_spec,
    not_default,
    same,
)
from kdrl_lightning.cli.settings.text import Text, is_data, load, plain
from kdrl_lightning.cli.settings.unused import note_dropped
from kdrl_lightning.cli.settings.user_code import build, import_object
from kdrl_lightning.common.untyped import Tree, Value

NUMERIC = re.compile(r"[+-]?\.?\d")
NestedArg = util.NestedArg
_adapt = typehints.adapt_typehints
_load_value = typehints.load_value
_discard = typehints.discard_init_args_on_class_path_change


def install() -> None:
    """Replace functions in jsonargparse's module by ours, so that its other functions call them."""
    if typehints.adapt_typehints is not adapt:
        vars(typehints).update(
            adapt_typehints=adapt,
            load_value=load_value,
            basic_json_or_yaml_load=load_basic,
            discard_init_args_on_class_path_change=discard,
            import_object=import_object,
        )
        add_instantiator(build, object)
        typehints.ActionTypeHint._check_type = check_type
        actions._ActionConfigLoad.__call__ = load_group


def load_value(value: str, *args: object, **kwargs: object) -> Any:
    """Return a command-line value as jsonargparse reads it; ``Text`` stays as it is."""
    return value if isinstance(value, Text) else _load_value(value, *args, **kwargs)


def load_basic(text: str) -> Value:
    """Return a number, boolean or null as in configuration files; anything else as text."""
    try:
        found = load(str(text))
    except yaml.YAMLError:
        return text
    # `Text` was quoted in a file: it may be meant as a number, but never as null.
    nothing = found is None and (isinstance(text, Text) or not text.strip())
    return text if nothing or isinstance(found, str | list | dict) else found


def discard(parser_or_action: object, previous: Value, value: Value) -> None:
    """Remove arguments of the old class that the new class lacks, and note them."""
    had = _arguments(previous)
    default: Any = getattr(parser_or_action, "default", None)
    known = is_spec(default) and is_spec(previous)
    by_default = known and default["class_path"] == previous["class_path"]
    old = _arguments(default) if by_default else {}
    had = {k: v for k, v in had.items() if k not in old or not same(old[k], v)}
    _discard(parser_or_action, previous, value)
    dropped = [name for name in had if name not in _arguments(previous)]
    if dropped and not typehints.sub_defaults.get():
        kind = typehints.import_object(previous["class_path"])
        given = not_default(kind, {name: had[name] for name in dropped})
        where = getattr(parser_or_action, "dest", "")
        note_dropped(where, given, previous["class_path"], value["class_path"])


def _arguments(spec: object) -> Tree:
    found = spec.get("init_args") if isinstance(spec, dict | Namespace) else None
    return dict(vars(found) if isinstance(found, Namespace) else found or {})


def adapt(val: Any, typehint: object, *args: object, **kwargs: object) -> Any:
    """Replace ``jsonargparse._typehints.adapt_typehints``: return a value converted to its type.

    Raises:
        ValueError: it does not fit; the message is about the type that the value is meant for.
    """
    if kwargs.get("serialize"):
        # Write untyped data as it is; jsonargparse would parse its strings again.
        as_it_is = typehints.accepts_any_value(typehint) and is_data(val)
        return val if as_it_is else _adapt(val, typehint, *args, **kwargs)
    building = kwargs.get("instantiate_classes")
    if building and isinstance(val, Namespace) and "dict_kwargs" in val:
        val = val.clone()
        val["dict_kwargs"] = plain(val["dict_kwargs"])
    if isinstance(val, NestedArg) and is_class(typehint):
        # The parser of the class decides whether the text of this argument is YAML.
        given = kwargs.get("orig_val")
        val = given if isinstance(given, NestedArg) else val
    if _is_named(typehint) and isinstance(val, dict):
        val = {str(k): v for k, v in val.items()}  # YAML reads the key 1 as a number
    if isinstance(val, list) and is_sequence(typehint) and not kwargs.get("append"):
        # A class must not get arguments of the class at the same place in the old list.
        kwargs["prev_val"] = None
    if is_spec(val) and "init_args" in val and val["init_args"] is None:
        val = {k: one for k, one in dict(val).items() if k != "init_args"}  # only comments
    if isinstance(val, str) and get_origin(typehint) is Literal:
        val = _chosen(val, get_args(typehint))
    if isinstance(val, Text) and typehint in (int, float, bool, NoneType):
        val = str(val)  # PyYAML accepts no subclass of `str`
    if get_origin(typehint) in (Union, UnionType):
        made = _adapt_union(val, typehint, *args, **kwargs)
    else:
        check_spec(val, [typehint])
        check_name(val, [typehint])
        check_class_given(val, [typehint], kwargs.get("prev_val"))
        check_class_named(val, typehint, kwargs.get("prev_val"))
        made = _adapt(val, typehint, *args, **kwargs)
    return plain(made) if building else made


def _is_named(typehint: object) -> bool:
    """Return whether a type is a mapping with text as keys."""
    kind = get_origin(typehint)
    named = inspect.isclass(kind) and issubclass(kind, Mapping)
    return named and get_args(typehint)[:1] == (str,)


def _adapt_union(val: object, typehint: object, *args: object, **kwargs: object) -> Any:
    if any(is_class(m) for m in get_args(typehint)):
        val = _spec_in(val)
    sequences = [m for m in get_args(typehint) if is_sequence(m)]
    if kwargs.get("append") and sequences:  # `--name+`: the value is one more entry
        return adapt(val, sequences[0], *args, **kwargs)
    check_given(val, typehint, kwargs.get("orig_val"))
    members = fitting(get_args(typehint), val, kwargs.get("prev_val"), kwargs.get("orig_val"))
    check_spec(val, members)
    check_name(val, members)
    check_class_given(val, members, kwargs.get("prev_val"))
    if len(members) == 1:
        return adapt(val, members[0], *args, **kwargs)
    try:
        return _adapt(val, Union[tuple(members)], *args, **kwargs)  # noqa: UP007
    except ValueError:
        choices = list(dict.fromkeys(one for m in members for one in _choices(m)))
        if choices and all(m in LEAVES or _choices(m) for m in members):
            raise ValueError(f"must be one of {', '.join(choices)}: got {val}.") from None
        numbers = [m for m in members if m in (int, float)]
        if isinstance(val, str) and NUMERIC.match(val):
            members = numbers or members
        errors = list(_errors(val, members, *args, **kwargs))
        if not errors:
            raise
        raise min(errors, key=_unlikely) from None


def check_given(val: object, typehint: object, given: Value) -> None:
    """Refuse null, or the text `null` of a flag, for a type without None.

    Raises:
        ValueError: the value is null.
    """
    text = given if val is None else val
    null = type(text) is str and text.strip().lower() in NULL  # in a file, a quoted one is text
    if null and NoneType not in get_args(typehint):
        raise ValueError(f"must be given: got {text}. Leave it out to keep its value.")


def _chosen(val: str, choices: tuple[object, ...]) -> Any:
    """Return the choice whose text is ``val``; jsonargparse would also take 0x10 for 16."""
    if any(isinstance(one, bool) for one in choices):
        return val
    found = [one for one in choices if str(one) == val]
    if not found:
        known = ", ".join(dict.fromkeys(map(str, choices)))
        raise ValueError(f"must be one of {known}: got {val}.")
    return found[0]


def _choices(member: object) -> list[str]:
    return [str(one) for one in get_args(member)] if get_origin(member) is Literal else []


def _spec_in(val: Any) -> Any:
    """Return the class that a command-line text describes as YAML; other values unchanged."""
    if type(val) is not str or "class_path" not in val:
        return val
    try:
        found = load(val)
    except yaml.YAMLError:
        return val
    return found if is_spec(found) else val


def _errors(
    val: object, members: Iterable[object], *args: object, **kwargs: object
) -> Iterator[Exception]:
    for member in members:
        try:
            adapt(deepcopy(val), member, *args, **kwargs)
        except Exception as error:
            yield error


def _unlikely(error: Exception) -> int:
    """Return a sort key, so that errors about arguments come first and wrong types last."""
    words = str(error)
    if words.startswith(("Expected a ", "Not a valid subclass")):
        return 2
    return 0 if "is not accepted" in words or "required" in words or "Parser key" in words else 1
