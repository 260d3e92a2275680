"""Generates configurations with one mistake each from the shipped ones.

A ``Case`` is what a user would write: the text of ``config.yaml``, and flags. Every mistake is one
that cannot work, whatever else the configuration says.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

import yaml
from hypothesis import strategies as st

from kdrl_lightning import KDRLModule, RolloutDataModule
from kdrl_lightning.cli.layered_yaml import load_with_base

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(
    p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name in ("configs", "recipes")
)
Key = tuple[str | int, ...]


class Case(NamedTuple):
    """A mistake; ``files`` are next to the configuration."""

    kind: str
    what: str
    text: str | bytes
    flags: list[str]
    files: dict[str, str | bytes] | None = None


def tree(path: Path, student: str, teacher: str) -> dict[str, Any]:
    """Return a shipped configuration with its bases merged, on two small random models."""
    config: dict[str, Any] = json.loads(json.dumps(load_with_base(path.read_text(), str(path))))
    config["model"]["student"] = student
    if config["model"].get("teacher"):
        config["model"]["teacher"] = {
            "class_path": "LocalTeacher",
            "init_args": {"model": teacher},
        }
    rows = {"class_path": "kdrl_lightning.tiny.ColumnAddition", "init_args": {"size": 64}}
    config["data"] |= {
        "train_prompts": rows,
        "val_prompts": rows,
        "reward": "kdrl_lightning.tiny.addition_reward",
    }
    config["data"]["rollout"] = config["data"].get("rollout", {}) | {"max_tokens": 8}
    config["data"] = {k: v for k, v in config["data"].items() if not k.endswith("engine")}
    trainer = config["trainer"]
    trainer |= {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "max_steps": 1}
    trainer |= {"strategy": "auto", "precision": "32-true"}
    return config


def places(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Yield every place of a tree with its value."""
    yield key, value
    pairs = value.items() if isinstance(value, dict) else ()
    pairs = enumerate(value) if isinstance(value, list) else pairs
    for name, inner in pairs:
        yield from places(inner, (*key, name))


def changed(config: Any, key: Key, value: Any) -> Any:
    """Return a copy with another value at one place."""
    made = copy.deepcopy(config)
    inside = made
    for name in key[:-1]:
        if isinstance(inside, dict):
            inside.setdefault(name, {})
        inside = inside[name]
    inside[key[-1]] = value
    return made


def misspelt(draw: Any, word: str) -> str:
    """Return a word with one letter more, fewer, or other."""
    at = draw(st.integers(0, len(word) - 1))
    letter = draw(st.sampled_from("xqjz"))
    forms = [word[:at] + word[at + 1 :], word[:at] + letter + word[at:], word + letter]
    return str(draw(st.sampled_from([f for f in forms if f and f != word and f != "base"])))


ODD_TEXTS = [
    "`x`",
    "@user",
    "{a}",
    "*x",
    "&x",
    "%",
    "x:",
    "007",
    "1e5",
    "0x10",
    "=",
    "a=b",
    "!x",
    "'",
    '"',
    ".",
    "..",
    "a.",
    ".a",
    "null.null",
    "os.system",
    "torch.nn",
    "kdrl_lightning",
    "../..",
    "${x}",
    "$(x)",
    "--x",
    "-",
    "é😀",
    "\\",
    "|",
    "[",
]
ODD_TEXTS += ["[think] x", "- a", "# x", "> a", "a: b: c", "a\nb", "\t", " ", "", "x" * 300]
ODD_TEXTS += ["x" * 9000, "x/" * 3000, "\ud800", "\u202e", "\ufeffx", "ａ", "e\u0301", "x\u2028y"]
ODD = st.one_of(
    st.sampled_from(ODD_TEXTS),
    st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12),
)
WRONG = {
    bool: ["perhaps", [True], {"zzz": 1}, 7.5],
    int: ["many", [[1]], {"zzz": 1}, "1.5.2", ""],
    float: ["warm", [[1.0]], {"zzz": 1}, "1,5"],
    str: [{"zzz": 1}, [[{"zzz": 1}]]],
}
COUNTS = ["prompts_per_rollout", "max_tokens", "minibatches_per_rollout", "epochs_per_rollout"]
COUNTS += ["rollouts_per_epoch", "max_tokens_per_micro_batch"]
AT_LEAST_1 = [*(f"rollout.{name}" for name in COUNTS), "max_prompt_tokens"]
AT_LEAST_1 += ["evaluation.samples", "evaluation.batch_size"]
AT_LEAST_0 = ["rollout.group_size", "teacher_completions.count", "seed"]
OUT_OF_RANGE: dict[str, list[Any]] = {
    **{f"data.{name}": [0, -1, -(10**12)] for name in AT_LEAST_1},
    **{f"data.{name}": [-1, -(2**63)] for name in AT_LEAST_0},
    "data.rollout.max_refills": [-1],
    "data.rollout.temperature": [0, -1, float("nan"), float("inf")],
    "data.evaluation.temperature": [-0.5, float("nan"), float("inf")],
    "data.rollout.max_off_policy_steps": [2, -1],
    "data.reward_failures.max_frac": [-0.1, 1.5, float("nan")],
    "data.overlong_prompts": ["maybe"],
    "data.reward_failures.reward": [float("nan"), float("inf")],
    "model.max_nonfinite_steps": [-1],
    "model.chunk_size": [0, -5],
    "model.attn_implementation": ["fastest", "flash_attention_2", "flash_attention_9"],
    "model.optimizer": [{"class_path": "torch.optim.AdamW", "init_args": {"lr": -1.0}}],
    "model.lora": [{"rank": 0}, {"rank": -3}, {"dropout": 2.0}],
    "trainer.max_steps": [-2],
    "trainer.accumulate_grad_batches": [0, -1, 10**6],
    "trainer.precision": [7, "32-false"],
    "trainer.limit_val_batches": [-1, 1.5],
    "trainer.log_every_n_steps": [-1],
    "trainer.num_sanity_val_steps": [-5],
    "trainer.check_val_every_n_epoch": [1.5],
    "trainer.gradient_clip_algorithm": ["maximum"],
    "trainer.accelerator": ["abacus"],
    "trainer.devices": [0, "none"],
    "trainer.strategy": ["luck"],
    "report.export": [3.7],
}
MISSING: dict[str, list[Any]] = {
    "model.student": ["no/such/model", "/no/such/model", "./nothing"],
    "model.teacher": [{"class_path": "LocalTeacher", "init_args": {"model": "no/such"}}],
    "data.train_prompts": [
        {"class_path": "JSONLPrompts", "init_args": {"path": "no.jsonl"}},
        {"class_path": "HFPrompts", "init_args": {"path": "no.csv"}},
        {"class_path": "HFPrompts", "init_args": {"path": "no/such/set"}},
        "no.yaml",
    ],
    "data.val_prompts": [
        {"ood": {"prompts": {"class_path": "JSONLPrompts", "init_args": {"path": "no.jsonl"}}}},
        {"class_path": "JSONLPrompts", "init_args": {"path": "no.jsonl"}},
    ],
    "data.reward": ["no_such_module.reward", "math.no_such_function", "NoSuchReward"],
    "ckpt_path": ["no.ckpt", "no/such/folder"],
    "base": ["no.yaml", "."],
}


@st.composite
def cases(draw: Any, configs: list[tuple[str, dict[str, Any]]]) -> Case:
    """Draw a mistake."""
    name, config = draw(st.sampled_from(configs))
    kind = draw(st.sampled_from(list(KINDS)))
    what, made, flags = KINDS[kind](draw, config)
    text = made if isinstance(made, str | bytes) else yaml.safe_dump(made, sort_keys=False)
    return Case(kind, f"{name}: {what}", text, flags)


def unknown_key(draw: Any, config: Any) -> Any:
    groups = [(key, value) for key, value in places(config) if isinstance(value, dict) and value]
    key, value = draw(st.sampled_from(groups))
    known = set(value) | {"config", "class_path", "c"}
    word = misspelt(draw, draw(st.sampled_from(sorted(value))))
    word = word if word not in known else f"{word}_z"
    made = draw(st.sampled_from([1, "x", None, {"a": 1}, [1]]))
    return f"{key}+{word}", changed(config, (*key, word), made), []


def unknown_flag(draw: Any, config: Any) -> Any:
    leaves = [".".join(map(str, k)) for k, v in places(config) if k and isinstance(v, int | str)]
    leaves = [k for k in leaves if not any(part.isdigit() for part in k.split("."))]
    flag = draw(st.sampled_from(leaves)).replace(".init_args", "")
    head, _, last = flag.rpartition(".")
    word = misspelt(draw, last) + "_z"
    flags = [f"--{head}.{word}={draw(ODD)}" if head else f"--{word}=1"]
    return flags[0], config, flags


def wrong_type(draw: Any, config: Any) -> Any:
    leaves = [
        (k, v) for k, v in places(config) if type(v) in WRONG and "callbacks" not in k and k[-1:]
    ]
    key, value = draw(st.sampled_from(leaves))
    wrong = draw(st.sampled_from(WRONG[type(value)]))
    return f"{key}={wrong!r}", changed(config, key, wrong), []


def _at(table: dict[str, list[Any]], draw: Any, config: Any) -> Any:
    name = draw(st.sampled_from(sorted(table)))
    value = draw(st.sampled_from(table[name]))
    key = tuple(name.split("."))
    made = copy.deepcopy(config)
    for group in key[:-1]:
        made.setdefault(group, {})
    return f"{name}={value!r}", changed(made, key, value), []


def out_of_range(draw: Any, config: Any) -> Any:
    return _at(OUT_OF_RANGE, draw, config)


def missing_file(draw: Any, config: Any) -> Any:
    return _at(MISSING, draw, config)


NAMED = ["model.objective", "model.student", "model.optimizer", "data.reward", "trainer.strategy"]
NAMED += ["data.train_prompts", "trainer.accelerator", "trainer.precision", "trainer.logger"]


def odd_string(draw: Any, config: Any) -> Any:
    """Put any text where a name must stand, in the file or by a flag."""
    name, text = draw(st.sampled_from(NAMED)), draw(ODD)
    works = ("", "~", "null", "true", "false", "yes", "no", "on", "off", "y", "n", "16", "32")
    if text.strip().lower() in works:
        text = f"{text}zz"
    if draw(st.booleans()):
        return f"{name}={text!r}", changed(config, tuple(name.split(".")), text), []
    return f"--{name}={text!r}", config, [f"--{name}={text}"]


def broken_yaml(draw: Any, config: Any) -> Any:
    text: str = yaml.safe_dump(config, sort_keys=False)
    at = draw(st.integers(1, len(text) - 2))
    forms: dict[str, str | bytes] = {
        "unclosed": f"{text}x: [1, 2\n",
        "tab": f"{text}x:\n\t- 1\n",
        "key twice": f"{text}trainer: {{}}\n",
        "inner key twice": text.replace("model:\n", "model:\n  student: x\n", 1),
        "list": "- 1\n- 2\n",
        "word": "hello\n",
        "empty": "",
        "binary": b"\xff\xfe\x00\x01" + text.encode(),
        "tag": f"{text}x: !!python/object:os.system {{}}\n",
        "two documents": f"{text}---\n{text}",
        "itself": f"base: config.yaml\n{text}",
        "anchor": f"{text}x: &a [*a]\n",
        "no anchor": f"{text}x: *nothing\n",
        "top level": f"{text[:at]}\n}}{text[at:]}",
    }
    form = draw(st.sampled_from(sorted(forms)))
    return form, forms[form], []


def list_for_scalar(draw: Any, config: Any) -> Any:
    """Put brackets around one value."""
    leaves = [
        (k, v)
        for k, v in places(config)
        if isinstance(v, bool | int | float | str) and k[-1] != "devices" and "callbacks" not in k
    ]
    key, value = draw(st.sampled_from(leaves))
    made = draw(st.sampled_from([[value], [value, value], [[value]], [{"a": value}]]))
    return f"{key}={made!r}", changed(config, key, made), []


def never_null() -> list[str]:
    """Return the settings of model and data whose type has no None."""
    names = []
    for group, kind in (("model", KDRLModule), ("data", RolloutDataModule)):
        hints = get_type_hints(kind.__init__)
        for name in inspect.signature(kind).parameters:
            if hints.get(name, Any) is not Any and NoneType not in get_args(hints[name]):
                names.append(f"{group}.{name}")
    return names


def null(draw: Any, config: Any) -> Any:
    name = draw(st.sampled_from(never_null()))
    if draw(st.booleans()):
        return f"--{name}=null", config, [f"--{name}=null"]
    return f"{name}=null", changed(config, tuple(name.split(".")), None), []


AMOUNTS = ["four", "4 GB", "1,000", "½", "1e", "0x", "4k", "1 000", "1e-6x", "--1", "1..2"]
AMOUNTS += ["1/2", "10%", "∞", "1.5.2", "+-1", "nan?", "1e5e5", "_1", "0b2", "9" * 40 + "x"]


def number_as_text(draw: Any, config: Any) -> Any:
    """Write a number as people do and YAML does not."""
    leaves = [(k, v) for k, v in places(config) if type(v) in (int, float) and "callbacks" not in k]
    key, _ = draw(st.sampled_from(leaves))
    text = draw(st.sampled_from(AMOUNTS))
    name = ".".join(map(str, key)).replace(".init_args", "")
    if draw(st.booleans()) and not any(part.isdigit() for part in name.split(".")):
        return f"--{name}={text}", config, [f"--{name}={text}"]
    return f"{key}={text!r}", changed(config, key, text), []


ROOMS = {
    "model.objective": ["GRPO", "KDRL", "RLAD"],
    "data.train_prompts": ["JSONLPrompts", "HFPrompts", "kdrl_lightning.tiny.ColumnAddition"],
    "data.reward": ["ExactMatch", "LengthPenalty", "WeightedRewards"],
    "model.optimizer": ["torch.optim.SGD", "torch.optim.AdamW"],
    "model.teacher": ["LocalTeacher"],
    "trainer.callbacks": ["CPUThreads", "CoefficientSchedule"],
    "trainer.logger": ["CSVLogger", "TensorBoardLogger"],
}


def two_classes(draw: Any, config: Any) -> Any:
    """Put a class where another kind is expected, or give a class the arguments of another."""
    name = draw(st.sampled_from(sorted(ROOMS)))
    key = tuple(name.split("."))
    other = draw(st.sampled_from(sorted(set(ROOMS) - {name})))
    stranger = draw(st.sampled_from(ROOMS[other]))
    forms: list[Any] = [stranger, {"class_path": stranger}, [{"class_path": stranger}]]
    inside = draw(st.sampled_from(ROOMS[name]))
    forms += [{"class_path": inside, "init_args": {"of_another_class": 1}}]
    forms += [{"class_path": inside, "init_args": {"class_path": stranger}}]
    forms += [{"class_path": inside, "init_args": [1]}, {"class_path": [inside]}]
    forms += [{"class_path": inside, "class_name": stranger}, {"init_args": {"of_none": 1}}]
    made = draw(st.sampled_from(forms))
    return f"{name}={made!r}", changed(config, key, made), []


PATHS: dict[str, Any] = {
    "ckpt_path": None,
    "model.student": None,
    "trainer.default_root_dir": None,
    "trainer.logger": ("CSVLogger", "save_dir"),
    "model.teacher": ("LocalTeacher", "model"),
    "data.train_prompts": ("JSONLPrompts", "path"),
    "data.val_prompts": ("HFPrompts", "path"),
}
NO_PATHS = ["a\0b", "\0", "x" * 5000, "config.yaml/x", "config.yaml/x/y"]


def odd_path(draw: Any, config: Any) -> Any:
    """Name a file that no system can have."""
    name, text = draw(st.sampled_from(sorted(PATHS))), draw(st.sampled_from(NO_PATHS))
    made = text
    if PATHS[name] is not None:
        kind, argument = PATHS[name]
        made = {"class_path": kind, "init_args": {argument: text}}
    made = changed(config, tuple(name.split(".")), made)
    if name == "trainer.default_root_dir":
        made["trainer"].pop("logger", None)
    return f"{name}={text[:40]!r}", made, []


KINDS = {
    "unknown key": unknown_key,
    "unknown flag": unknown_flag,
    "wrong type": wrong_type,
    "out of range": out_of_range,
    "missing file": missing_file,
    "odd string": odd_string,
    "broken YAML": broken_yaml,
    "list for a scalar": list_for_scalar,
    "null": null,
    "number as text": number_as_text,
    "two classes": two_classes,
    "odd path": odd_path,
}
