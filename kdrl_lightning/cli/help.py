"""Prints ``--help``: one screen for the program, and one for each of its large subcommands.

We write these screens by hand, because the parser's help has 900 lines and imports torch.
``--help_all`` prints the parser's help.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from kdrl_lightning.errors import ConfigurationError

PROGRAM = "python -m kdrl_lightning"
HELP_ALL = "--help_all"

# Subcommand -> what it does, in the order of the screen.
SUBCOMMANDS = {
    "fit": "trains the student, and measures it before, during and after",
    "validate": "measures a student on the validation prompts",
    "test": "measures a student on the test prompts",
    "predict": "writes completions and their rewards to a file",
    "evaluate": "compares models and checkpoints on the same prompts, in one table",
    "export": "writes a checkpoint's student as a Hugging Face folder",
    "serve": "starts a vLLM server that samples for a run or serves its teacher",
    "doctor": "checks that training works on this machine, with its GPUs and vLLM",
    "plan": "says whether a run fits its GPUs: memory, disk, seconds",
    "configs": "lists, shows and copies the configurations of the library",
}

TRAINS, RUNS = ("fit",), ("fit", "validate", "test", "predict")
MEASURES = ("validate", "test", "predict", "evaluate")
ALL = (*RUNS, "evaluate")
OTHER_SUBCOMMANDS = tuple(name for name in SUBCOMMANDS if name not in RUNS)

# Heading -> flag, what it means, and the subcommands whose screen shows it.
FLAGS: dict[str, list[tuple[str, str, Sequence[str]]]] = {
    "": [
        ("--config NAME", "a YAML file, or a name that `configs` lists", ALL),
        ("", "Give several: a later one adds to an earlier one.", ALL),
        ("--print_config", "print all settings of the run, and do not run it", ALL),
        (
            "--models.NAME MODEL",
            "a model: folder, hub name or checkpoint. Give several.",
            ["evaluate"],
        ),
        ("--output FOLDER", "where the table goes", ["evaluate"]),
        ("--ckpt_path last", "continue the newest run of this configuration", TRAINS),
        ("--ckpt_path PATH", "continue from this checkpoint", TRAINS),
        (
            "--ckpt_path PATH",
            "take the student of this checkpoint",
            ["validate", "test", "predict"],
        ),
        ("--seed_everything N", "seed of the prompts' order and of sampling", TRAINS),
        ("--seed_everything N", "seed of sampling", MEASURES),
        ("--profile", "print where the time of the second rollout goes", TRAINS),
    ],
    "Model": [
        ("--model.student MODEL", "the model to train: Hugging Face folder or hub name", TRAINS),
        ("--model.student MODEL", "the model: Hugging Face folder or hub name", RUNS[1:]),
        ("--model.teacher CLASS", "the frozen teacher, such as LocalTeacher", TRAINS),
        ("--model.objective CLASS", "the method, such as KDRL, RLAD or GRPO", TRAINS),
        ("--model.optimizer CLASS", "such as torch.optim.AdamW", TRAINS),
    ],
    "Data": [
        ("--data.train_prompts CLASS", "prompts to train on, such as JSONLPrompts", TRAINS),
        ("--data.val_prompts CLASS", "prompts to validate on", ["fit", "validate"]),
        ("--data.test_prompts CLASS", "prompts to measure on", ["test", "predict", "evaluate"]),
        ("--data.reward CLASS", "a class such as ExactMatch, or your function", ALL),
        ("--data.rollout_engine CLASS", "such as TransformersEngine or VLLMEngine", ALL),
        ("--data.rollout.prompts_per_rollout N", "prompts that are sampled at once", TRAINS),
        ("--data.rollout.group_size N", "completions per prompt", TRAINS),
        ("--data.rollout.max_tokens N", "longest completion", ALL),
        ("--data.evaluation.samples N", "completions per prompt", MEASURES),
        ("--data.evaluation.temperature T", "sampling temperature; 0 is greedy", MEASURES),
    ],
    "Trainer (Lightning's)": [
        ("--trainer.max_steps N", "optimizer steps", TRAINS),
        (
            "--trainer.accumulate_grad_batches N",
            "micro-batches per step; more of them take less memory",
            TRAINS,
        ),
        ("--trainer.accelerator NAME", "cpu, gpu or auto", ALL),
        ("--trainer.devices N", "number of GPUs", ALL),
        ("--trainer.strategy NAME", "how GPUs share the work, such as ddp or fsdp2", ALL),
        ("--trainer.precision NAME", "such as bf16-mixed", ALL),
        ("--trainer.default_root_dir FOLDER", "where runs go", RUNS),
    ],
}
COLUMN = 38

FIRST_SCREEN = f"""\
usage: {PROGRAM} SUBCOMMAND [--config NAME ...] [--KEY VALUE ...]

Post-train a language model with rewards and a frozen teacher (KDRL, RLAD, ...).

{{subcommands}}

A first run, on a CPU and without a download, takes about two minutes:
  {PROGRAM} fit --config rlad

Read on:
  {PROGRAM} SUBCOMMAND --help   its most important flags
  {PROGRAM} configs             what --config finds by name
  docs/getting_started.md, in the repository   from a first run to your model"""


def help_text(args: Sequence[str]) -> str | None:
    """Return the help screen that a command line requests; None if it requests none.

    Args:
        args: the command line after the program.

    Raises:
        ConfigurationError: the subcommand is missing or unknown.

    >>> print(help_text(["--help"])[:42])
    usage: python -m kdrl_lightning SUBCOMMAND
    >>> help_text(["fit", "--config", "rlad"])
    """
    if not args:
        raise ConfigurationError(f"a subcommand must be given: got none. {_choice()}")
    first, asked = args[0], any(word in ("-h", "--help") for word in args)
    if first in ("-h", "--help"):
        return first_screen()
    if first in ALL:
        return screen(first) if asked else None
    if first not in SUBCOMMANDS and not first.startswith("-"):
        close = get_close_matches(first, SUBCOMMANDS, n=1)
        cure = f"Did you mean {close[0]}?" if close else _choice()
        raise ConfigurationError(f"the subcommand must be a known one: got {first}. {cure}")
    return None


def first_screen() -> str:
    """Return the program's help: its subcommands, and where to read more."""
    lines = [f"  {name:<10}{words}" for name, words in SUBCOMMANDS.items()]
    return FIRST_SCREEN.format(subcommands="\n".join(lines))


def screen(subcommand: str) -> str:
    """Return the help of a subcommand: the flags that most runs need."""
    command = f"{PROGRAM} {subcommand}"
    words = SUBCOMMANDS[subcommand]
    out = [f"usage: {command} --config NAME [--config NAME ...] [--KEY VALUE ...]", ""]
    out += [f"{words[0].upper()}{words[1:]}.", ""]
    for heading, flags in FLAGS.items():
        shown = [(flag, text) for flag, text, where in flags if subcommand in where]
        out += [heading] if heading and shown else []
        out += [f"  {flag:<{COLUMN}}{text}" for flag, text in shown]
    of_a_class = "model.objective RLAD" if subcommand in TRAINS else "data.reward ExactMatch"
    key, name = of_a_class.split()
    out += [
        "",
        f"All flags, with types and defaults:  {command} {HELP_ALL}",
        f"The arguments of a class:            {command} --{key}.help {name}",
    ]
    return "\n".join(out)


def _choice() -> str:
    return f"Choose one of {', '.join(SUBCOMMANDS)} (see `{PROGRAM} --help`)."
