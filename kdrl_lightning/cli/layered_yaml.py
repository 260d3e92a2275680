"""Reads configurations that build on another file (``base: other.yaml``) and list differences.

jsonargparse merges files only on the command line (``--config a --config b``), but a method should
be one file that runs by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import set_dumper, set_loader

from kdrl_lightning.cli.settings import unions
from kdrl_lightning.cli.settings.layers.merging import merge
from kdrl_lightning.cli.settings.layers.overlaid import Layer, keep
from kdrl_lightning.cli.settings.private import util
from kdrl_lightning.cli.settings.renamed import renamed
from kdrl_lightning.cli.settings.text import TwiceError, dump, load, plain
from kdrl_lightning.cli.shipped import find
from kdrl_lightning.common.untyped import Value
from kdrl_lightning.errors import ConfigurationError


def install() -> None:
    """Make jsonargparse read YAML, write YAML and report mistakes with this package's code."""
    set_loader("yaml", read, exceptions=(yaml.YAMLError,))
    set_dumper("yaml", dump)
    unions.install()


# `Any` in this file: a YAML document, as PyYAML types it.
def load_with_base(text: str, path: str) -> Value:
    """Return the settings of a YAML text, merged over those of its ``base`` if it has one.

    Args:
        text: YAML.
        path: path of the file. ``base`` is relative to it, or names a configuration of the
            library.

    Raises:
        ConfigurationError: a file is not YAML or has a key twice, a base does not exist, or a file
            is its own base.
    """
    return plain(_resolve(_document(text, path), Path(path), ()))


def read(text: str, path: str | None = None) -> Value:
    """Return the value of a YAML text for jsonargparse, with ``Text`` for strings.

    Args:
        text: YAML.
        path: path of the file, see ``load_with_base``. None: the text is a value of the command
            line, or the file that jsonargparse is reading.

    Raises:
        ConfigurationError: a file is not YAML or has a key twice, a base does not exist, or a file
            is its own base.
        yaml.YAMLError: a value of the command line is not YAML.
    """
    file = _being_read(text)
    if path is None and file is None:
        return _value(text)
    # jsonargparse changes into the folder of a file that it reads, and passes only its last name.
    full, name = file or (path or "", path or "--config")
    found = _resolve(_document(text, name), Path(full), ())
    return {} if found is None else found  # None: all lines are comments


def _being_read(text: str) -> tuple[str, str] | None:
    """Return path and given name of the file that jsonargparse read a text from, or None."""
    for full, name in util.config_load_stack.get()[-1:]:
        try:
            if Path(full).read_text(encoding="utf-8") == text:
                return full, name
        except (OSError, UnicodeDecodeError):
            return None
    return None


def _value(text: str) -> Value:
    """Return a value of the command line, e.g. ``a:`` and ``# a`` as text, not as YAML."""
    found = load(text)
    if found is None and text.strip().lower() not in ("null", "~", ""):
        return text
    if isinstance(found, dict) and found and all(v is None for v in found.values()):
        return text
    return found


def _document(text: str, name: str) -> Value:
    try:
        found = load(text)
    except TwiceError as error:
        first, second = error.lines
        raise ConfigurationError(
            f"`{error.key}` must occur once in a mapping of {name}: got it in line {first} and in "
            f"line {second}. Remove one."
        ) from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{name} must be YAML: got {error}. Correct it.") from error
    for key in found if isinstance(found, dict) else ():
        above = [k for k in _prefixes(str(key)) if _holds(found, str(key), k)]
        if above:
            raise ConfigurationError(
                f"`{key}` must occur once in {name}: got it with dots and inside `{above[0]}`. "
                "Remove one."
            )
    return renamed(found, name) if isinstance(found, dict) else found


def nested(settings: dict[Any, Any]) -> dict[Any, Any]:
    """Return settings in which names with dots have become nested mappings.

    >>> nested({"a": {"x": 1}, "a.y": 2, "b.c.z": 3})
    {'a': {'x': 1, 'y': 2}, 'b': {'c': {'z': 3}}}
    """
    made: dict[Any, Any] = {}
    for key, value in settings.items():
        for name in reversed(key.split(".") if isinstance(key, str) else [key]):
            value = {name: value}
        made = _joined(made, value)
    return made


def _joined(one: Value, other: Value) -> Value:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return other
    return one | {k: _joined(one[k], v) if k in one else v for k, v in other.items()}


def _prefixes(key: str) -> list[str]:
    names = key.split(".")
    return [".".join(names[:i]) for i in range(1, len(names))]


def _holds(found: dict[Any, Any], key: str, above: str) -> bool:
    """Return whether settings hold a dotted key a second time, nested below its prefix."""
    if above not in found:
        return False
    tree = found[above]
    for name in key[len(above) + 1 :].split("."):
        if not isinstance(tree, dict):
            return tree is not None  # `model.objective: GRPO` and an argument of it
        if name not in tree:
            return False
        tree = tree[name]
    return True


def _resolve(value: Value, path: Path, seen: tuple[Path, ...]) -> Value:
    if not isinstance(value, dict) or "base" not in value:
        return value
    over = nested({k: v for k, v in value.items() if k != "base"})
    if not isinstance(value["base"], str):
        raise ConfigurationError(
            f"`base` must name one YAML file: got {value['base']!r}. Give its path or name as text."
        )
    file = (path.parent / value["base"]).resolve()
    if not file.exists():
        file = find(value["base"]) or file
    if not file.is_file() or file in seen:
        what = "which is its own base" if file in seen else "which is not a file"
        raise ConfigurationError(
            f"`base` must name a YAML file: got {file}, {what}. Correct the name."
        )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"`base` must be readable UTF-8: got {file} ({error}). Save it as UTF-8."
        ) from error
    below = _resolve(_document(text, str(file)), file, (*seen, file))
    if not isinstance(below, dict | None):
        raise ConfigurationError(
            f"`base` must name a file of settings by name: got {file} with {below!r:.80}. Write "
            "them as `name: value`."
        )
    below = nested(below or {})
    for name, settings in over.items():
        had = below.get(name)
        if isinstance(settings, dict) and isinstance(had, str | list):
            raise ConfigurationError(
                f"`{name}` must have settings by name: got {had!r:.80} in {file}. Write them as "
                "`name: value`."
            )
    keep(Layer(str(value["base"]), below, over))
    return merge(below, over)
