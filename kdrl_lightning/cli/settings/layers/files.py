"""Merges a second ``--config`` file over earlier settings as over a ``base``: mappings key by key.

jsonargparse would replace the whole mapping. A flag still replaces it. Actions and values are
typed ``Any``, as in jsonargparse.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from jsonargparse import Namespace

from kdrl_lightning.cli.settings.layers.merging import merge
from kdrl_lightning.cli.settings.layers.replaced import held, is_default, note_lost
from kdrl_lightning.cli.settings.private import actions, typehints
from kdrl_lightning.cli.settings.shapes import is_spec
from kdrl_lightning.common.untyped import Value

_load_group = actions._ActionConfigLoad.__call__
_check_type = typehints.ActionTypeHint._check_type
# Inside a class, jsonargparse knows only the last part of a setting's name.
_groups: ContextVar[tuple[str, ...]] = ContextVar("groups", default=())


def check_type(
    self: Any, value: Value, append: bool = False, cfg: Any = None, mode: Any = None
) -> Any:
    """Replace ``ActionTypeHint._check_type``: merge a mapping over the earlier one, then check it.

    Notes what the value replaces.
    """
    before = cfg.get(self.dest) if cfg else None
    known = before is not None and not is_default(before, self.default)
    had = held(before) if known else None
    token = _groups.set((*_groups.get(), self.dest))
    try:
        where = ".".join(_groups.get())
        if known and not append:
            value = laid_over(before, value, where)
        made = _check_type(self, value, append=append, cfg=cfg, mode=mode)
        if had is not None and not typehints.sub_defaults.get():
            note_lost(where, before, had, made)
    finally:
        _groups.reset(token)
    return made


def load_group(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Merge the file of a group, e.g. ``--trainer=trainer.yaml``, over its earlier settings.

    Notes what the file replaces.
    """
    if not args:  # jsonargparse is creating the action
        return _load_group(self, **kwargs)
    parser, namespace = args[:2]
    defaults = {action.dest: action.default for action in parser._actions}
    before = namespace.get(self.dest)
    inside = [] if before is None else list(before.items(branches=True))
    had = [(f"{self.dest}.{key}", value, held(value)) for key, value in inside]
    made = _load_group(self, *args, **kwargs)
    for key, value, lost in had:
        if not is_default(value, defaults.get(key)):
            where = key.replace(".init_args", "")
            if key in namespace:
                namespace[key] = laid_over(value, namespace[key], where)
            note_lost(where, value, lost, namespace.get(key), "an earlier value")
    return made


def laid_over(before: Any, value: Any, where: str) -> Any:
    """Return a mapping merged over an earlier one; other values unchanged.

    >>> laid_over({"hours": 1}, {"minutes": 30}, "trainer.max_time")
    {'hours': 1, 'minutes': 30}
    """
    if not _is_plain(before) or not _is_plain(value):
        return value
    below, over = _dicts(before), _dicts(value)
    return value if below == over else merge(below, over, where)  # jsonargparse checks it again


def _is_plain(value: Any) -> bool:
    return isinstance(value, dict) and not is_spec(value) and "class_path" not in value


def _dicts(value: Any) -> Any:
    if isinstance(value, Namespace | Mapping):
        entries = vars(value) if isinstance(value, Namespace) else value
        return {key: _dicts(one) for key, one in entries.items()}
    return [_dicts(one) for one in value] if isinstance(value, list) else value
