"""YAML whose strings stay strings, and whose mappings name each key once.

jsonargparse reads every plain ``str`` as YAML again, up to three times: in an untyped place the
quoted ``"007"`` ends as 7, and the prompt ``"Q: 2+2?"`` as a mapping. It leaves subclasses of
``str`` alone, so the strings that YAML has already given are ``Text`` until a class receives them.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
FLOAT, INT = "tag:yaml.org,2002:float", "tag:yaml.org,2002:int"
BOOL, NULL = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:null"
# Of YAML 1.1, these surprise: dates, the value `=`, that 1e5 is no number, that 1:30 is 90, and
# that 010 is 8.
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
    """A string that YAML has already read."""

    __slots__ = ()


class TwiceError(yaml.constructor.ConstructorError):  # type: ignore[misc]
    """A key that stands twice in one mapping.

    Attributes:
        key: the key.
        lines: where it stands, from 1.
    """

    def __init__(self, key: str, lines: tuple[int, int]) -> None:
        super().__init__(problem=f"`{key}` stands in lines {lines[0]} and {lines[1]}")
        self.key = key
        self.lines = lines


class Loader(BASE):  # type: ignore[misc]
    """A safe YAML loader that makes ``Text`` and refuses a key given twice."""

    def get_single_node(self) -> Any:
        """Return the document's node.

        Raises:
            yaml.YAMLError: a mapping names a key twice, or an anchor holds itself.
        """
        node = super().get_single_node()
        _check_keys(node, ())
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node; its names are plain strings, `yes` and `null` too."""
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag in (BOOL, NULL):
                key.tag = "tag:yaml.org,2002:str"
        made = super().construct_mapping(node, deep)
        return {str(k) if isinstance(k, Text) else k: v for k, v in made.items()}

    def construct_int(self, node: Any) -> int:
        """Return a whole number, in base ten unless it begins with 0x or 0b."""
        text = self.construct_scalar(node).replace("_", "")
        base = {"0x": 16, "0b": 2}.get(text.lstrip("+-")[:2].lower(), 10)
        return int(text, base)


def _check_keys(node: Any, open_nodes: tuple[int, ...]) -> None:
    if id(node) in open_nodes:
        raise yaml.constructor.ConstructorError(problem="an anchor holds itself")
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
    """Writes what ``Loader`` reads back as the same value."""

    def represent_str(self, data: str) -> Any:
        """Return the node of a string."""
        # Only double quotes keep these line breaks.
        style = '"' if any(mark in data for mark in "\r\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", str(data), style)


def load(text: str) -> Any:
    """Read YAML.

    Raises:
        yaml.YAMLError: it is none, or holds a key twice.

    >>> load('{a: "007", b: 010, c: 2026-01-01, d: 1e5, e: =, f: 1:30, yes: no}')
    {'a': '007', 'b': 10, 'c': '2026-01-01', 'd': 100000.0, 'e': '=', 'f': '1:30', 'yes': False}
    """
    try:
        return yaml.load(text, Loader=Loader)
    except (ValueError, LookupError, RecursionError) as error:  # e.g. of `!!int ""`
        raise yaml.YAMLError(str(error)) from error


def dump(value: Any) -> str:
    r"""Write YAML; a string that would be read as something else is quoted.

    >>> dump({"a": "1e5", "b": Text("007"), "c": 1e-6})
    "a: '1e5'\nb: '007'\nc: 1.0e-06\n"
    """
    text: str = yaml.dump(
        value, Dumper=Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False
    )
    return text


def plain(value: Any) -> Any:
    """Return a value with ``str`` in place of ``Text``, as a class receives it.

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


def is_data(value: Any) -> bool:
    """Whether a value is made of what YAML has: numbers, strings, lists and mappings.

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
Loader.add_constructor("tag:yaml.org,2002:str", lambda loader, node: Text(node.value))
Loader.add_constructor(INT, Loader.construct_int)
# Other readers of YAML, e.g. Lightning's of hyper-parameters, must read the same text as we do.
Dumper.add_implicit_resolver(FLOAT, NUMBER, list("-+0123456789."))
Dumper.add_implicit_resolver(INT, WHOLE, list("-+0123456789"))
for kind in (str, Text):
    Dumper.add_representer(kind, Dumper.represent_str)
