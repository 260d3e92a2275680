"""Generates more of the mistakes that people make: in files, overlays, flags, lists, mappings."""

from __future__ import annotations

import copy
from typing import Any

import yaml
from hypothesis import strategies as st

from helpers.bad_inputs import Case, Key, misspelt, places

ROWS = '{"prompt": "1=", "answer": "1"}\n'
CLASSES = {
    "model.objective": "kdrl_lightning.objectives.GRPO",
    "model.optimizer": "torch.optim.AdamW",
    "model.lr_scheduler": "torch.optim.lr_scheduler.ConstantLR",
    "model.teacher": "kdrl_lightning.teachers.LocalTeacher",
    "data.reward": "kdrl_lightning.rewards.ExactMatch",
    "data.train_prompts": "kdrl_lightning.prompts.JSONLPrompts",
    "data.rollout_engine": "kdrl_lightning.TransformersEngine",
    "trainer.logger": "lightning.pytorch.loggers.CSVLogger",
}
CALLBACK = "kdrl_lightning.callbacks.CPUThreads"
# What a list or a mapping must not hold.
INSIDE: dict[str, list[Any]] = {
    "trainer.callbacks": [
        [5],
        [None],
        ["NoSuchCallback"],
        [["CPUThreads"]],
        [{"class_path": "CPUThreads", "init_args": {"thread": 1}}],
        [{"class_path": "CPUThreads", "init_args": {"threads": "all"}}],
        [{"class_path": "CPUThreads", "threads": 1}],
        [{"CPUThreads": {"threads": 1}}],
        {"first": "CPUThreads", "second": "CPUThreads"},
        [{"class_path": "torch.optim.AdamW"}],
    ],
    "trainer.logger": [
        [5],
        ["NoLogger"],
        {"CSVLogger": {}},
        [{"class_path": "CSVLogger", "init_args": {"save_dirr": "x"}}],
        [{"class_path": "CSVLogger", "init_args": {"save_dir": [1]}}],
    ],
    "trainer.plugins": [[5], "no_plugin", {"a": 1}],
    "trainer.profiler": ["fastest", 5],
    "data.train_prompts": [
        [],
        [1],
        ["1="],
        [{}],
        [{"answer": "1"}],
        [{"prompt": 1}],
        [{"prompt": None}],
        [{"prompt": ""}],
        [{"prompt": []}],
        [{"prompt": [{"role": "user"}]}],
        [{"prompt": [{"role": "nobody", "content": "1="}]}],
        [{"prompt": [{"role": "user", "content": 1}]}],
        [{"prompt": "1=", "answer": None}] * 2 + [None],
        {"prompt": "1="},
        "1=",
        {"class_path": "MixedPrompts", "init_args": {"sources": {}}},
        {"class_path": "MixedPrompts", "init_args": {"sources": {"a": [1]}}},
        {"class_path": "MixedPrompts", "init_args": {"sources": {"a": "b"}}},
    ],
    "data.val_prompts": [
        {"a": 1},
        {"a": None},
        {"a": {"prompts": 1}},
        {"a": {"prompts": [], "samples": 1}},
        {"a": {"samples": 3}},
        {"a": {"prompts": [{"prompt": "1="}], "sample": 3}},
        {"a": {"prompts": [{"prompt": "1="}], "samples": 0}},
        {"a": {"prompts": [{"prompt": "1="}], "k": [3], "samples": 2}},
        {"a": {"prompts": [{"prompt": "1="}], "temperature": "hot"}},
        {"a": {"prompts": [{"prompt": "1="}]}, "b": [1]},
    ],
    "data.val_k": [["x"], [0], [1.5], [9], "all", {"a": 1}],
    "data.reward": [
        {"class_path": "WeightedRewards", "init_args": {"rewards": {}}},
        {"class_path": "WeightedRewards", "init_args": {"rewards": [1]}},
        {"class_path": "WeightedRewards", "init_args": {"rewards": {"a": 1}}},
        {"class_path": "ExactMatch", "init_args": {"no_such": 1}},
        [],
        5,
    ],
    "model.lora": [
        {"target_modules": [1]},
        {"target_modules": ["no_such_layer"]},
        {"rank": "high"},
        {"alpha": -1},
        [8],
        "yes",
        {"r": 8},
    ],
    "model.optimizer": [
        {"class_path": "torch.optim.AdamW", "init_args": {"lr": "fast"}},
        {"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.9]}},
        {"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.9, "x"]}},
        {"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.9, 1.5]}},
        {"class_path": "torch.optim.AdamW", "init_args": {"learning_rate": 0.1}},
        {"class_path": "torch.optim.AdamW", "lr": 0.1},
        {"AdamW": {"lr": 0.1}},
        1e-4,
        [],
    ],
    "model.lr_scheduler": [
        {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": {"start_factor": 7.0}},
        {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": {"steps": 7}},
        {"class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau"},
        "cosine",
    ],
}
# Numbers in a wrong unit or out of range, for settings of libraries that take any number.
UNITS: dict[str, list[Any]] = {
    "data.max_tokens": ["8 tokens", "1k", 10**9, 7.5],
    "data.group_size": [1, "8x", 1.5],
    "data.prompts_per_rollout": ["all", 0.5],
    "data.minibatches_per_rollout": [10**6, 0.5],
    "data.temperature": ["0,7", "70%", True],
    "data.max_prompt_tokens": [1, "50%"],
    "data.max_reward_failure_frac": [10, "10%"],
    "trainer.accumulate_grad_batches": [0, -1, 2.5, "auto"],
    "trainer.gradient_clip_val": [-1.0, float("nan"), "1%", "inf", [1.0]],
    "trainer.max_time": ["90", "1h", "1:00", {"hour": 1}, {"minutes": "ten"}, -5],
    "trainer.max_epochs": [-5, 1.5, "ten"],
    "trainer.min_steps": [-5, "x"],
    "trainer.val_check_interval": [0, -1, -0.5, 1.5, "1 hour", "often"],
    "trainer.check_val_every_n_epoch": [0, -1, "x"],
    "trainer.limit_train_batches": [-1, -0.5, 2.5, "half", 0],
    "trainer.overfit_batches": [-1, 1.5, "x"],
    "trainer.precision": ["fp16", "bfloat16", 8, "float32", "16-true"],
    "trainer.devices": ["gpu", "2 gpus", "cuda:0", -3, 1.5, [], "-1x"],
    "trainer.num_nodes": [0, -1, "two", 1.5],
    "trainer.num_sanity_val_steps": [-2, "x", 0.5],
    "trainer.log_every_n_steps": [-5, "x", 0.5],
    "trainer.deterministic": ["sometimes", 2],
    "trainer.reload_dataloaders_every_n_epochs": [-1, "x"],
    "trainer.accelerator": ["gpus", "cuda:0", 1],
    "trainer.strategy": ["ddp2", "fsdp", "fsdp3", "deepspeed_stage_9"],
    "seed_everything": [-1, 1.5, "random", 2**40, [1]],
    "checkpoint.keep_last": [0, -1, "all", 1.5],
    "checkpoint.save_top_k": [-1, "best"],
    "checkpoint.every_n_rollouts": [0, -1, 0.5],
    "checkpoint.mode": ["maximum", "MAX", 1],
    "checkpoint.monitor": [["val/accuracy"], {"a": 1}],
    "checkpoint.dirpath": [[1], {"a": 1}],
    "trainer.default_root_dir": ["config.yaml", "config.yaml/x", [1]],
    "ckpt_path": ["config.yaml", ".", "..", ["a"], "best"],
    "imitation_stats": [5, [1], "on"],
    "report": ["off", [1]],
    "samples": [5, {"rows": 1}],
    "weight_sync": ["never", {"max_kl": "x"}],
    "predictions": ["x", {"format": "xls"}],
}
NULLS = ["model", "data", "model.objective", "model.optimizer.class_path", "data.train_prompts"]
NULLS += ["model.student", "data.max_tokens", "data.reward", "data.val_samples", "data.temperature"]
NULLS += ["trainer.accelerator", "trainer.devices", "trainer.strategy", "trainer.num_nodes"]
NULLS += ["checkpoint.keep_last", "checkpoint", "report", "trainer"]


def at(config: Any, name: str, value: Any) -> Any:
    """Return a copy with a value at a dotted name."""
    key: Key = tuple(name.split("."))
    made = copy.deepcopy(config)
    inside = made
    for group in key[:-1]:
        if not isinstance(inside.get(group), dict):
            inside[group] = {}
        inside = inside[group]
    inside[key[-1]] = value
    return made


def of_table(draw: Any, config: Any, table: dict[str, list[Any]]) -> Any:
    name = draw(st.sampled_from(sorted(table)))
    value = draw(st.sampled_from(table[name]))
    return f"{name}={value!r:.200}", at(config, name, value), [], {}


def inside(draw: Any, config: Any) -> Any:
    return of_table(draw, config, INSIDE)


def unit(draw: Any, config: Any) -> Any:
    return of_table(draw, config, UNITS)


def null_inside(draw: Any, config: Any) -> Any:
    """Write null, or leave the line of a setting empty."""
    name = draw(st.sampled_from(NULLS))
    return f"{name}=null", at(config, name, None), [], {}


def misspelt_class(draw: Any, config: Any) -> Any:
    """Name a class, a module or a package that is not there."""
    name = draw(st.sampled_from(sorted(CLASSES)))
    words = CLASSES[name].split(".")
    place = draw(st.integers(0, len(words) - 1))
    forms = [".".join([*words[:place], misspelt(draw, words[place]), *words[place + 1 :]])]
    forms += [misspelt(draw, words[-1]), CLASSES[name].lower(), CLASSES[name].replace(".", "/")]
    forms += [f"{'.'.join(words[:-1])}:{words[-1]}", f"{CLASSES[name]}()", f"{CLASSES[name]}.py"]
    forms += [f"class {words[-1]}", ".".join(words[:-1]), f"my_module.py:{words[-1]}", words[0]]
    path = draw(st.sampled_from([form for form in forms if form not in CLASSES.values()]))
    made = draw(
        st.sampled_from([path, {"class_path": path}, {"class_path": path, "init_args": {}}])
    )
    return f"{name}={made!r}", at(config, name, made), [], {}


OVERLAYS: dict[str, str | bytes] = {
    "a list": "- 1\n",
    "a word": "hello\n",
    "a number": "5\n",
    "an unknown group": "modle: {chunk_size: 4}\n",
    "an unknown key": "trainer: {max_step: 4}\n",
    "a group in a group": "trainer: {trainer: {max_steps: 4}}\n",
    "a group too few": "max_steps: 4\n",
    "a wrong type": "data: {max_tokens: many}\n",
    "a group as a list": "data: [max_tokens, 4]\n",
    "a group as text": "data: max_tokens\n",
    "no base": "base: none.yaml\n",
    "a base as a list": "base: [config.yaml]\n",
    "a base within": "data: {base: config.yaml}\n",
    "its own base": "base: over.yaml\n",
    "a list by a mapping": "trainer: {callbacks: {a: 1}}\n",
    "an entry of no list": "data: {max_tokens+: 4}\n",
    "an argument of no class": "model: {objective: {init_args: {no_such: 1}}}\n",
    "a class without its name": "model: {teacher: {model: x}}\n",
    "latin-1": "# café\ndata: {max_tokens: 4}\n".encode("latin-1"),
    "utf-16": "data: {max_tokens: 4}\n".encode("utf-16"),
    "a tab": "data:\n\tmax_tokens: 4\n",
    "a tab after a colon": "data:\n  max_tokens:\t4\n \tgroup_size: 2\n",
    "a zero byte": "data: {max_tokens: 4\0}\n",
    "a key twice": "data: {max_tokens: 4, max_tokens: 5}\n",
    "a group twice": "data: {max_tokens: 4}\ndata: {group_size: 2}\n",
    "crlf and a key twice": "data:\r\n  max_tokens: 4\r\n  max_tokens: 5\r\n",
    "a bom and a word": "\ufeffhello\n",
    "no anchor": "data: {<<: *none}\n",
    "a merged word": "x: &a word\ndata: {<<: *a}\n",
    "a leftover anchor": "x: &a {max_tokens: 4}\ndata: {<<: *a}\n",
    "a broken quote": "data: {max_tokens: '4}\n",
    "no space after a colon": "data:\n  max_tokens:4\n",
    "a smart quote": "data: {max_tokens: “4”}\n",
    "wrong indent": "data:\n  max_tokens: 4\n group_size: 2\n",
    "an equals sign": "data.max_tokens = 4\n",
    "a conflict of git": "<<<<<<< HEAD\ndata: {max_tokens: 4}\n=======\n",
    "json with a comma": '{"data": {"max_tokens": 4,}, }}\n',
    "a variable": "data: {max_tokens: ${TOKENS}}\n",
    "a template": "data: {max_tokens: {{ tokens }}}\n",
    "a python object": "data: {max_tokens: !!python/name:os.system ''}\n",
    "a tag of ours": "data: !include other.yaml\n",
    "a key that is a list": "? [a, b]\n: 1\n",
    "a key that is a number": "5: 1\n",
    "keys that are no text": "data: {5: 1, null: 2, true: 3}\n",
}


def overlay(draw: Any, config: Any) -> Any:
    """Lay a second file with a mistake over the configuration, or make it its base."""
    name = draw(st.sampled_from(sorted(OVERLAYS)))
    files = {"over.yaml": OVERLAYS[name]}
    as_base = draw(st.booleans())
    # A base may be empty, and the file itself gives what it lacks.
    if as_base and name != "a smart quote":  # the file's value is laid over it
        return f"base with {name}", {"base": "over.yaml", **config}, [], files
    return f"overlay with {name}", config, ["--config", "over.yaml"], files


DATA: dict[str, str | bytes] = {
    "rows.jsonl:empty": "",
    "rows.jsonl:blank": "\n\n\n",
    "rows.jsonl:no json": ROWS + "prompt: 1=\n",
    "rows.jsonl:cut": ROWS + ROWS[:-9],
    "rows.jsonl:a list": "[" + ROWS.strip() + "]\n",
    "rows.jsonl:numbers": "1\n2\n",
    "rows.jsonl:no prompt": '{"question": "1=", "answer": "1"}\n',
    "rows.jsonl:null prompt": ROWS + '{"prompt": null, "answer": "1"}\n',
    "rows.jsonl:utf-16": ROWS.encode("utf-16"),
    "rows.jsonl:latin-1": '{"prompt": "é", "answer": "1"}\n'.encode("latin-1"),
    "rows.jsonl:binary": bytes(range(256)),
    "rows.jsonl:gzip": b"\x1f\x8b\x08\x00abc",
    "rows.json:no json": "prompt,answer\n1=,1\n",
    "rows.json:empty": "",
    "rows.csv:empty": "",
    "rows.csv:no prompt": "question,answer\n1=,1\n",
    "rows.csv:no header": "1=,1\n2=,2\n",
    "rows.csv:binary": bytes(range(256)) * 4,
    "rows.csv:header alone": "prompt,answer\n",
    "rows.parquet:empty": "",
    "rows.parquet:a csv": "prompt,answer\n1=,1\n",
    "rows.txt:text": "1=\n2=\n",
    "rows.xlsx:a sheet": b"PK\x03\x04nothing",
    "rows.yaml:no class": "hello: 1\n",
}


def bad_data(draw: Any, config: Any) -> Any:
    """Give as a file of rows something that is none, or a folder."""
    which = draw(st.sampled_from(sorted(DATA)))
    file, _, what = which.partition(":")
    kind = draw(st.sampled_from(["JSONLPrompts", "HFPrompts"]))
    if kind == "JSONLPrompts" and not file.endswith("jsonl"):
        kind = "HFPrompts"
    place = draw(st.sampled_from(["train_prompts", "val_prompts"]))
    path = draw(st.sampled_from([file, file, file, "."]))
    spec = {"class_path": kind, "init_args": {"path": path}}
    made = at(config, f"data.{place}", spec)
    return f"{place}: {kind} of {path}, {what}", made, [], {file: DATA[which]}


MODELS: dict[str, dict[str, str | bytes]] = {
    "an empty folder": {"notes.txt": "x"},
    "an empty config": {"config.json": ""},
    "no json": {"config.json": "{"},
    "a list": {"config.json": "[]"},
    "no type": {"config.json": "{}"},
    "an unknown type": {"config.json": '{"model_type": "no_such_model"}'},
    "no weights": {"config.json": '{"model_type": "qwen2"}'},
    "an encoder": {"config.json": '{"model_type": "bert"}'},
    "weights alone": {"model.safetensors": b"\x00" * 64},
    "a tokenizer alone": {"tokenizer.json": "{}"},
    "an adapter": {"adapter_config.json": '{"peft_type": "LORA"}'},
    "broken weights": {"config.json": '{"model_type": "qwen2"}', "model.safetensors": b"x" * 64},
    "wrong sizes": {"config.json": '{"model_type": "qwen2", "hidden_size": "big"}'},
}


def bad_model(draw: Any, config: Any) -> Any:
    """Give as a model a folder or a file that is none."""
    what = draw(st.sampled_from(sorted(MODELS)))
    files = {f"model/{name}": content for name, content in MODELS[what].items()}
    role = draw(st.sampled_from(["student", "teacher"]))
    path = draw(st.sampled_from(["model", "./model/", "model", next(iter(files))]))
    spec = {"class_path": "LocalTeacher", "init_args": {"model": path}}
    made = at(config, f"model.{role}", path if role == "student" else spec)
    if role == "teacher":
        made["model"]["objective"] = {"class_path": "KDRL", "init_args": {"teacher_kl_coef": 0.1}}
    return f"{role} {path}: {what}", made, [], files


FLAGS = [
    ["--data.max_tokens"],
    ["--data.max_tokens", "8", "9"],
    ["data.max_tokens=8"],
    ["-data.max_tokens=8"],
    ["\u2013\u2013data.max_tokens=8"],
    ["\u2014data.max_tokens=8"],
    ["--data.max_tokens:8"],
    ["--data.max-tokens=8"],
    ["--Data.max_tokens=8"],
    ["--data.max_tokens==8"],
    ["--data.max_tokens="],
    ["--data.max_tokens= "],
    ["--data..max_tokens=8"],
    ["--data.=8"],
    ["--=8"],
    ["--data=8"],
    ["--data=[]"],
    ["--data=none.yaml"],
    ["--model=null"],
    ["--data=null"],
    ["--trainer={max_step: 4}"],
    ["--data.train_prompts.sise=4"],
    ["--data.max_tokens.more=4"],
    ["--data.max_tokens+=4"],
    ["--trainer.callbacks+=NoSuch"],
    ["--trainer.callbacks+"],
    ["--model.objective.no_such=1"],
    ["--model.objective=GRPO", "--model.objective.no_such=1"],
    ["--model.student="],
    ["--model.student=null"],
    ["--model.student=~"],
    ["--model.student=[]"],
    ["--model.objective=null"],
    ["--data.reward=null"],
    ["--data.train_prompts=null"],
    ["--config"],
    ["--config="],
    ["--config=none.yaml"],
    ["--config=."],
    ["--config={"],
    ["--config={max_tokens: 4}"],
    ["--config=null"],
    ["--confg=config.yaml"],
    ["fit"],
    ["train"],
    ["&"],
    [""],
    [" "],
    ["#", "a", "comment"],
    ["--print_config=x"],
    ["--print_confg"],
    ["--ckpt_path"],
    ["--ckpt_path=lst"],
    ["--ckpt_path=config.yaml"],
    ["--seed_everything=x"],
    ["--trainer.max_steps=1e"],
    ["--trainer.max_steps=1.5"],
    ["--trainer.max_steps=1,000"],
    ["--trainer.devices=cuda"],
    ["--trainer.strategy=fsdp"],
    ["--profile=maybe"],
    ["--weights_only=maybe"],
]


def bad_flag(draw: Any, config: Any) -> Any:
    flags = draw(st.sampled_from(FLAGS))
    return f"{flags}", config, flags, {}


def duplicate(draw: Any, config: Any) -> Any:
    """Write a key of any depth twice."""
    text = yaml.safe_dump(config, sort_keys=False)
    keys = [(k, v) for k, v in places(config) if k and not isinstance(v, dict | list)]
    keys = [(k, v) for k, v in keys if not any(isinstance(part, int) for part in k)]
    key, _ = draw(st.sampled_from(keys))
    lines = text.splitlines()
    line = f"{'  ' * (len(key) - 1)}{key[-1]}:"
    at_line = [i for i, one in enumerate(lines) if one.startswith(f"{line} ")]
    i = draw(st.sampled_from(at_line))
    lines.insert(i, f"{line} 5")
    ends = draw(st.sampled_from(["\n", "\r\n"]))
    return f"{key} twice", ends.join(lines) + ends, [], {}


MORE = {
    "wrong inside": inside,
    "wrong unit": unit,
    "null inside": null_inside,
    "misspelt class": misspelt_class,
    "overlay": overlay,
    "bad data": bad_data,
    "bad model": bad_model,
    "bad flag": bad_flag,
    "duplicate": duplicate,
}


@st.composite
def more_cases(draw: Any, configs: list[tuple[str, dict[str, Any]]]) -> Case:
    """Draw one of these mistakes."""
    name, config = draw(st.sampled_from(configs))
    kind = draw(st.sampled_from(list(MORE)))
    what, made, flags, files = MORE[kind](draw, config)
    text = made if isinstance(made, str | bytes) else yaml.safe_dump(made, sort_keys=False)
    return Case(kind, f"{name}: {what}", text, flags, files)
