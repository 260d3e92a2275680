"""Reads and writes YAML so that strings stay strings, and refuses duplicate keys.

jsonargparse parses every plain ``str`` as YAML again, up to three times: if a setting has no type,
the quoted ``"007"`` becomes 7, and the prompt ``"Q: 2+2?"`` a mapping. It does not parse subclasses
of ``str``, so strings from YAML are ``Text`` until a class receives them.

Nodes and values are typed ``Any``, as in PyYAML.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

import yaml

from kdrl_lightning.common.untyped import Value

BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
FLOAT, INT = "tag:yaml.org,2002:float", "tag:yaml.org,2002:int"
BOOL, NULL = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:null"
STR = "tag:yaml.org,2002:str"
# These rules of YAML 1.1 surprise users: it converts dates and `=`, and reads 1e5 as text, 1:30 as
# 90, and 010 as 8.
LEFT_OUT = {FLOAT, INT, "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value"}
WHOLE = re.compile(r"^[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|[0-9][0-9_]*)$")
NUMBER = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.X,
)


class Text(str):
    """A string from YAML, which jsonargparse must not parse again."""

    __slots__ = ()


class TwiceError(yaml.constructor.ConstructorError):  # type: ignore[misc]
    """Raised for a key that occurs twice in one mapping.

    Attributes:
        key: the key.
        lines: the two lines in which it occurs, from 1.
    """

    def __init__(self, key: str, lines: tuple[int, int]) -> None:
        super().__init__(problem=f"`{key}` occurs in lines {lines[0]} and {lines[1]}")
        self.key = key
        self.lines = lines


class Loader(BASE):  # type: ignore[misc]
    """Loads YAML safely, with ``Text`` for strings, and refuses duplicate keys."""

    def get_single_node(self) -> Any:
        """Return the document's node.

        Raises:
            yaml.YAMLError: a mapping has a key twice, or an anchor contains itself.
        """
        node = super().get_single_node()
        _check_keys(node, ())
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node, with plain strings as keys, also for `yes` and `null`.

        In a row with a prompt, the values `no` and `yes` are text; elsewhere they are booleans.
        """
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        is_row = any(key.value == "prompt" for key, _ in pairs)
        for key, value in pairs:
            if key.tag in (BOOL, NULL):
                key.tag = STR
            if is_row and value.tag == BOOL and value.value.lower() not in ("true", "false"):
                value.tag = STR
        made = super().construct_mapping(node, deep)
        return {str(k) if isinstance(k, Text) else k: v for k, v in made.items()}

    def construct_int(self, node: Any) -> int:
        """Return a whole number, in base ten unless it begins with 0x or 0b."""
        text = self.construct_scalar(node).replace("_", "")
        base = {"0x": 16, "0b": 2}.get(text.lstrip("+-")[:2].lower(), 10)
        return int(text, base)


def _check_keys(node: Any, open_nodes: tuple[int, ...]) -> None:
    if id(node) in open_nodes:
        raise yaml.constructor.ConstructorError(problem="an anchor contains itself")
    open_nodes = (*open_nodes, id(node))
    if isinstance(node, yaml.SequenceNode):
        for one in node.value:
            _check_keys(one, open_nodes)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise TwiceError(key.value, (lines[name], line))
            lines[name] = line
        _check_keys(value, open_nodes)


class Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes YAML that ``Loader`` reads back as the same value."""

    def represent_str(self, data: str) -> Any:
        """Return the node of a string."""
        # Only double quotes keep these line breaks.
        style = '"' if any(mark in data for mark in "\r\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", str(data), style)


def load(text: str) -> Value:
    """Return the value of a YAML text, with ``Text`` for strings.

    Raises:
        yaml.YAMLError: the text is not YAML, or has a key twice.

    >>> load('{a: "007", b: 010, c: 2026-01-01, d: 1e5, e: =, f: 1:30, yes: no}')
    {'a': '007', 'b': 10, 'c': '2026-01-01', 'd': 100000.0, 'e': '=', 'f': '1:30', 'yes': False}
    """
    try:
        return yaml.load(text, Loader=Loader)
    except (ValueError, LookupError, RecursionError) as error:  # e.g. of `!!int ""`
        raise yaml.YAMLError(str(error)) from error


def dump(value: Value) -> str:
    r"""Return a value as YAML, with quotes around strings that YAML would not read as strings.

    >>> dump({"a": "1e5", "b": Text("007"), "c": 1e-6})
    "a: '1e5'\nb: '007'\nc: 1.0e-06\n"
    """
    text: str = yaml.dump(
        value, Dumper=Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False
    )
    return text


def plain(value: Value) -> Value:
    """Return a value with ``str`` in place of ``Text``, for the class that receives it.

    >>> type(plain([Text("a")])[0])
    <class 'str'>
    """
    if isinstance(value, Text):
        return str(value)
    if type(value) is dict:
        return {k: plain(v) for k, v in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(plain(v) for v in value)
    return value


def is_data(value: Value) -> bool:
    """Return whether a value consists of numbers, strings, lists and mappings only.

    >>> is_data({"a": [1, None, "x"]}), is_data({"a": print}), is_data({"class_path": "x"})
    (True, False, False)
    """
    if isinstance(value, list):
        return all(is_data(one) for one in value)
    if type(value) is dict:
        return "class_path" not in value and all(is_data(one) for one in value.values())
    return value is None or isinstance(value, bool | int | float | str)


def _resolve_as_we_do(kind: Any) -> None:
    rules = {
        first: [(tag, rule) for tag, rule in known if tag not in LEFT_OUT]
        for first, known in kind.yaml_implicit_resolvers.items()
    }
    kind.yaml_implicit_resolvers = rules
    kind.add_implicit_resolver(FLOAT, NUMBER, list("-+0123456789."))
    kind.add_implicit_resolver(INT, WHOLE, list("-+0123456789"))


_resolve_as_we_do(Loader)
Loader.add_constructor(STR, lambda loader, node: Text(node.value))
Loader.add_constructor(INT, Loader.construct_int)
# Other YAML readers, e.g. Lightning for hyper-parameters, must read back the same values.
Dumper.add_implicit_resolver(FLOAT, NUMBER, list("-+0123456789."))
Dumper.add_implicit_resolver(INT, WHOLE, list("-+0123456789"))
for kind in (str, Text):
    Dumper.add_representer(kind, Dumper.represent_str)
# Defaults of other libraries' classes may be enumerations of strings or numbers, or paths.
Dumper.add_multi_representer(str, lambda dumper, data: dumper.represent_str(str.__str__(data)))
Dumper.add_multi_representer(int, lambda dumper, data: dumper.represent_int(int(data)))
Dumper.add_multi_representer(float, lambda dumper, data: dumper.represent_float(float(data)))
Dumper.add_multi_representer(PurePath, lambda dumper, data: dumper.represent_str(str(data)))
