"""Translates old names of settings to new ones, so that users' files and flags still work.

We translate a file when we read it, before merging it with another one; the file of a group
(``--data data.yaml``) when the parser gets it; a flag before parsing it.

Values, and the keys of YAML mappings, are typed ``Any``, as in PyYAML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdrl_lightning.cli.settings.unused import note, note_renamed
from kdrl_lightning.common.untyped import Value
from kdrl_lightning.errors import ConfigurationError

_ROLLOUT = (
    "prompts_per_rollout",
    "group_size",
    "max_refills",
    "max_tokens",
    "temperature",
    "minibatches_per_rollout",
    "epochs_per_rollout",
    "max_off_policy_steps",
    "rollouts_per_epoch",
    "mask_truncated",
    "max_tokens_per_micro_batch",
)
# Old name -> new name.
RENAMED = {
    **{f"data.{name}": f"data.rollout.{name}" for name in _ROLLOUT},
    "data.teacher_completions": "data.teacher_completions.count",
    "data.teacher_temperature": "data.teacher_completions.temperature",
    "data.teacher_engine": "data.teacher_completions.engine",
    "data.val_batch_size": "data.evaluation.batch_size",
    "data.val_samples": "data.evaluation.samples",
    "data.val_temperature": "data.evaluation.temperature",
    "data.val_k": "data.evaluation.k",
    "data.max_reward_failure_frac": "data.reward_failures.max_frac",
    "data.failed_reward": "data.reward_failures.reward",
}
# In 0.1 this was a number, now it is a group: we translate only a number.
NOW_A_GROUP = "data.teacher_completions"
# (class, argument) -> the class that replaces it with this argument set to true.
SPLIT = {("HFPrompts", "streaming"): "StreamedHFPrompts"}
SUBCOMMANDS = ("fit", "validate", "test", "predict")


def renamed(settings: Mapping[Any, Any], where: str) -> dict[Any, Any]:
    """Return the settings of a file under their new names.

    Args:
        settings: settings by name; top-level names may have dots.
        where: name of the file, for messages.

    Raises:
        ConfigurationError: a setting is given by its old and by its new name.

    >>> renamed({"data": {"group_size": 4, "rollout": {"max_tokens": 8}}}, "x.yaml")
    {'data': {'rollout': {'max_tokens': 8, 'group_size': 4}}}
    >>> renamed({"data.teacher_engine.urls": ["http://a"], "data.teacher_completions": 2}, "x")
    {'data.teacher_completions.engine.urls': ['http://a'], 'data.teacher_completions.count': 2}
    """
    out: dict[Any, Any] = {}
    for name, value in settings.items():
        if name in SUBCOMMANDS and isinstance(value, Mapping):
            out[name] = renamed(value, where)
        elif name == "data" and isinstance(value, Mapping):
            out[name] = _renamed_data(value, where)
        else:
            new = new_name(name, value) if isinstance(name, str) else None
            if new is not None:
                note_renamed(name, new)
                _refuse_both(new in settings or _holds(settings, new), name, new, where)
            out[new or name] = value
    return {name: with_classes(value) for name, value in out.items()}


def with_classes(value: Value) -> Value:
    """Return a value in which the new names replace those of split classes, see ``SPLIT``.

    >>> with_classes([{"class_path": "HFPrompts", "init_args": {"take": 2, "streaming": True}}])
    [{'class_path': 'StreamedHFPrompts', 'init_args': {'take': 2}}]
    """
    if type(value) is list:
        return [with_classes(one) for one in value]
    if type(value) is not dict:
        return value
    out = {key: with_classes(one) for key, one in value.items()}
    path, given = str(out.get("class_path", "")), out.get("init_args")
    for (name, argument), new in SPLIT.items():
        if path.rsplit(".", 1)[-1] == name and isinstance(given, dict) and argument in given:
            rest = {k: v for k, v in given.items() if k != argument}
            out["init_args"] = rest
            if given[argument]:
                note(f"{name} with `{argument}` is now {new}. 0.3 removes `{argument}`.")
                out["class_path"] = path.removesuffix(name) + new
    return out


def _renamed_data(data: Mapping[Any, Any], where: str) -> dict[Any, Any]:
    """Return the settings of ``data`` under their new names, each in its group."""
    out = {k: v for k, v in data.items() if new_name(f"data.{k}", v) is None}
    for name, value in data.items():
        old = f"data.{name}"
        new = new_name(old, value)
        if new is None:
            continue
        note_renamed(old, new)
        _, group, inner = new.split(".", 2)
        held = out.get(group)
        held = {} if held is None else held
        both = not isinstance(held, Mapping) or inner in held
        _refuse_both(both or f"{group}.{inner}" in data, old, new, where)
        out[group] = {**held, inner: value}
    return out


def _holds(settings: Mapping[Any, Any], name: str) -> bool:
    held: Any = settings
    for key in name.split("."):
        if not isinstance(held, Mapping) or key not in held:
            return False
        held = held[key]
    return True


def renamed_flags(words: Sequence[str]) -> list[str]:
    """Return a command line in which new names replace old ones.

    Raises:
        ConfigurationError: a setting is given by its old and by its new name.

    >>> renamed_flags(["--data.group_size", "4", "--data.val_k=[1, 2]", "--data.seed=1"])
    ['--data.rollout.group_size', '4', '--data.evaluation.k=[1, 2]', '--data.seed=1']
    """
    flags = {word.split("=", 1)[0] for word in words}
    out = []
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if not equals and place + 1 < len(words):
            value = words[place + 1]
        new = new_name(flag[2:], value) if flag.startswith("--") else None
        if new is not None:
            note_renamed(flag[2:], new)
            _refuse_both(f"--{new}" in flags, flag, f"--{new}", "the command line")
            word = f"--{new}{word[len(flag) :]}"
        out.append(word)
    return out


def new_name(name: str, value: Value) -> str | None:
    """Return the new name of a setting; None if its name has not changed.

    >>> new_name("data.teacher_engine.urls", []), new_name("data.teacher_completions", {"count": 2})
    ('data.teacher_completions.engine.urls', None)
    """
    if name == NOW_A_GROUP:
        return RENAMED[name] if _is_number(value) else None
    head = ".".join(name.split(".", 2)[:2])
    key = head.removesuffix("+")
    if key not in RENAMED or key == NOW_A_GROUP:
        return None
    return RENAMED[key] + name[len(key) :]


def _is_number(value: Value) -> bool:
    """Return whether a value is a number, not a group or the file of a group."""
    if isinstance(value, str):
        return value.strip().lstrip("+-").replace(".", "", 1).isdigit()
    return isinstance(value, int | float)


def _refuse_both(both: bool, old: str, new: str, where: str) -> None:
    if both:
        raise ConfigurationError(
            f"`{new}` must occur once in {where}: got it by its old name `{old}`, too. Remove that."
        )
