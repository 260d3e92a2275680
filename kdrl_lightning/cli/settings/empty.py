"""Finds an empty group with an unknown name, which jsonargparse would drop silently."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from jsonargparse import Namespace

from kdrl_lightning.common.untyped import Value


def unknown_group(
    settings: Collection[str], groups: Collection[str], value: Value, name: str = ""
) -> str | None:
    """Return the name of the first empty group whose name is unknown, or None.

    Args:
        settings: the names of all settings, with dots.
        groups: the names of settings that only hold other settings.
        value: a group, or the value of a setting.
        name: name of ``value``, with dots; empty for the outermost group.

    >>> unknown_group({"a.b"}, (), {"a": {"b": {}, "c": {}}}), unknown_group({"a.b"}, (), {"a": {}})
    ('a.c', None)
    """
    if not isinstance(value, Mapping | Namespace) or (name in settings and name not in groups):
        return None
    held = vars(value) if isinstance(value, Namespace) else value
    if not held and name:
        return None if any(one.startswith(f"{name}.") for one in settings) else name
    for key, inside in held.items():
        path = f"{name}.{key}" if name else str(key)
        found = unknown_group(settings, groups, inside, path.removesuffix("+"))
        if found:
            return found
    return None
