"""``base: other.yaml`` at the top of a configuration: start from that file, list what differs.

Written by hand because jsonargparse layers files only on the command line (``--config a --config
b``), and a method should be one file that runs by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from kdrl_lightning.errors import ConfigurationError

CLASS = {"class_path", "init_args", "dict_kwargs"}
_yaml = get_loader("yaml")


def install() -> None:
    """Make jsonargparse's YAML loader understand ``base``."""
    set_loader("yaml", load_with_base)


def load_with_base(text: str, path: str = "") -> Any:
    """Load YAML; a mapping with ``base`` is merged over the file that it names.

    Args:
        text: YAML.
        path: where it comes from; ``base`` is relative to it.

    Raises:
        ConfigurationError: a file is not YAML, a base does not exist, or bases form a circle.
    """
    return _resolve(_load(text, path), Path(path), ())


def merge(base: Any, over: Any) -> Any:
    """Merge mappings key by key; anything else in ``over`` replaces what ``base`` has.

    A different ``class_path`` replaces the whole class, so that no argument leaks into another;
    so does a mapping of other names, e.g. of evaluation sets.

    >>> merge({"a": {"x": 1, "y": 2}, "b": [1]}, {"a": {"y": 3}, "b": [2]})
    {'a': {'x': 1, 'y': 3}, 'b': [2]}
    """
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if "class_path" in over and over["class_path"] != base.get("class_path"):
        return over
    if "class_path" in base and not set(over) <= CLASS:
        return over
    return {k: merge(base.get(k), over[k]) if k in over else base[k] for k in {**base, **over}}


def _load(text: str, path: str) -> Any:
    try:
        return _yaml(text)
    except yaml.YAMLError as error:
        if not path:  # a value on the command line: jsonargparse tries other readings of it
            raise
        raise ConfigurationError(f"{path} must be YAML: {error}") from error


def _resolve(value: Any, path: Path, seen: tuple[Path, ...]) -> Any:
    if not isinstance(value, dict) or not isinstance(value.get("base"), str):
        return value
    own = {k: v for k, v in value.items() if k != "base"}
    file = (path.parent / value["base"]).resolve()
    if not file.is_file() or file in seen:
        what = "which is its own base" if file in seen else "which is no file"
        raise ConfigurationError(f"`base` must name a YAML file: got {file}, {what}.")
    return merge(_resolve(_load(file.read_text(), str(file)), file, (*seen, file)), own)
