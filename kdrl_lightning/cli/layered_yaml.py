"""``base: other.yaml`` at the top of a configuration: start from that file, list what differs.

Written by hand because jsonargparse layers files only on the command line (``--config a --config
b``), and a method should be one file that runs by itself.
"""

from __future__ import annotations

from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any

import yaml
from jsonargparse import set_dumper, set_loader

from kdrl_lightning.cli.settings import unions
from kdrl_lightning.cli.settings.private import util
from kdrl_lightning.cli.settings.renamed import renamed
from kdrl_lightning.cli.settings.replaced import contents, note_lost
from kdrl_lightning.cli.settings.text import TwiceError, dump, load, plain
from kdrl_lightning.cli.settings.unused import note_dropped
from kdrl_lightning.cli.shipped import find
from kdrl_lightning.errors import ConfigurationError

CLASS = {"class_path", "init_args", "dict_kwargs"}


def install() -> None:
    """Make jsonargparse read and write YAML, and name a mistake, as this library does."""
    set_loader("yaml", read, exceptions=(yaml.YAMLError,))
    set_dumper("yaml", dump)
    unions.install()


def load_with_base(text: str, path: str) -> Any:
    """Load YAML; a mapping with ``base`` is merged over the file that it names.

    Args:
        text: YAML.
        path: where it comes from. ``base`` is relative to it, or names a configuration of the
            library.

    Raises:
        ConfigurationError: a file is not YAML or names a key twice, a base does not exist, or bases
            form a circle.
    """
    return plain(_resolve(_document(text, path), Path(path), ()))


def read(text: str, path: str | None = None) -> Any:
    """Load YAML for jsonargparse; its strings are ``Text``.

    Args:
        text: YAML.
        path: where it comes from, see ``load_with_base``. None: a value of the command line, or
            the file that jsonargparse is reading.

    Raises:
        ConfigurationError: a file is not YAML or names a key twice, a base does not exist, or bases
            form a circle.
        yaml.YAMLError: a value of the command line is not YAML.
    """
    file = _being_read(text)
    if path is None and file is None:
        return _value(text)
    # jsonargparse changes into the folder of a file that it reads, and passes its last name alone.
    full, name = file or (path or "", path or "--config")
    return _resolve(_document(text, name), Path(full), ())


def merge(base: Any, over: Any, where: str = "") -> Any:
    """Merge mappings key by key; anything else in ``over`` replaces what ``base`` has.

    A different ``class_path`` replaces the whole class, so that no argument leaks into another;
    so does a mapping of other names, e.g. of evaluation sets. A list under ``name+`` is added to
    the one that ``base`` has.

    >>> merge({"a": {"x": 1, "y": 2}, "b": [1], "c": [1]}, {"a": {"y": 3}, "b": [2], "c+": [2]})
    {'a': {'x': 1, 'y': 3}, 'b': [2], 'c': [1, 2]}
    """
    if isinstance(base, list) or isinstance(over, list):
        note_lost(where, base, contents(base), over, "the list of its base")
    if isinstance(base, dict) and "class_path" in base and isinstance(over, str):
        if _same(base["class_path"], over):
            return base
        _note_dropped(where, base, {"class_path": over})
    if over is None and "." not in where and isinstance(base, dict) and "class_path" not in base:
        return base  # a group all of whose lines are comments
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if "class_path" in over and not _same(base.get("class_path"), over["class_path"]):
        _note_dropped(where, base, over)
        return over
    if "class_path" in base and not set(over) <= CLASS:
        return over
    merged = dict(base)
    for key, value in over.items():
        path = f"{where}.{key}" if where else str(key)
        longer = key.removesuffix("+") if isinstance(key, str) and key.endswith("+") else None
        if longer is None:
            merged.pop(f"{key}+", None)
            merged[key] = merge(base.get(key), value, path)
        else:
            place = longer if longer in merged else key
            merged[place] = [*_items(merged.get(place)), *_items(value)]
    return merged


def _being_read(text: str) -> tuple[str, str] | None:
    """Return path and given name of the file whose content jsonargparse has passed, if it has."""
    for full, name in util.config_load_stack.get()[-1:]:
        try:
            if Path(full).read_text(encoding="utf-8") == text:
                return full, name
        except (OSError, UnicodeDecodeError):
            return None
    return None


def _same(one: Any, other: Any) -> bool:
    """Whether two names are of one class, which may be given by its name alone."""
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


def _note_dropped(where: str, base: dict[str, Any], over: dict[str, Any]) -> None:
    had, has = (spec.get("init_args") for spec in (base, over))
    lost = [name for name in had or () if name not in (has or ())]
    note_dropped(where, lost, str(base.get("class_path")), str(over["class_path"]))


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _value(text: str) -> Any:
    """Read a value of the command line; a comment, an anchor or a lone name is text."""
    found = load(text)
    if found is None and text.strip().lower() not in ("null", "~", ""):
        return text
    if isinstance(found, dict) and found and all(v is None for v in found.values()):
        return text
    return found


def _document(text: str, name: str) -> Any:
    try:
        found = load(text)
    except TwiceError as error:
        first, second = error.lines
        raise ConfigurationError(
            f"`{error.key}` must stand once in a mapping of {name}: got it in line {first} and in "
            f"line {second}. Remove one."
        ) from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{name} must be YAML: {error}") from error
    for key in found if isinstance(found, dict) else ():
        above = [k for k in _prefixes(str(key)) if _holds(found, str(key), k)]
        if above:
            raise ConfigurationError(
                f"`{key}` must stand once in {name}: got it with dots and inside `{above[0]}`. "
                "Remove one."
            )
    return renamed(found, name) if isinstance(found, dict) else found


def nested(settings: dict[Any, Any]) -> dict[Any, Any]:
    """Return settings whose names have no dots at the top.

    >>> nested({"a": {"x": 1}, "a.y": 2, "b.c.z": 3})
    {'a': {'x': 1, 'y': 2}, 'b': {'c': {'z': 3}}}
    """
    made: dict[Any, Any] = {}
    for key, value in settings.items():
        for name in reversed(key.split(".") if isinstance(key, str) else [key]):
            value = {name: value}
        made = _joined(made, value)
    return made


def _joined(one: Any, other: Any) -> Any:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return other
    return one | {k: _joined(one[k], v) if k in one else v for k, v in other.items()}


def _prefixes(key: str) -> list[str]:
    names = key.split(".")
    return [".".join(names[:i]) for i in range(1, len(names))]


def _holds(found: dict[Any, Any], key: str, above: str) -> bool:
    """Whether a key with dots stands inside the value of one of its beginnings, too."""
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


def _resolve(value: Any, path: Path, seen: tuple[Path, ...]) -> Any:
    if not isinstance(value, dict) or "base" not in value:
        return value
    own = nested({k: v for k, v in value.items() if k != "base"})
    if not isinstance(value["base"], str):
        raise ConfigurationError(f"`base` must name one YAML file: got {value['base']!r}.")
    file = (path.parent / value["base"]).resolve()
    if not file.exists():
        file = find(value["base"]) or file
    if not file.is_file() or file in seen:
        what = "which is its own base" if file in seen else "which is no file"
        raise ConfigurationError(f"`base` must name a YAML file: got {file}, {what}.")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"`base` must be readable UTF-8: got {file} ({error}).") from error
    below = _resolve(_document(text, str(file)), file, (*seen, file))
    if not isinstance(below, dict | None):
        raise ConfigurationError(
            f"`base` must hold settings by name: got {file} with {below!r:.80}."
        )
    below = nested(below or {})
    for name, settings in own.items():
        had = below.get(name)
        if isinstance(settings, dict) and isinstance(had, str | list):
            raise ConfigurationError(
                f"`{name}` must have settings by name: got {had!r:.80} in {file}."
            )
    return merge(below, own)
