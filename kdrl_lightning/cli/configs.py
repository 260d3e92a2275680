"""Runs ``python -m kdrl_lightning configs``: list, show or copy the configurations."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from kdrl_lightning.cli.layered_yaml import load_with_base
from kdrl_lightning.cli.plain_parser import PlainParser
from kdrl_lightning.cli.settings.text import dump
from kdrl_lightning.cli.shipped import FOLDER, names, require
from kdrl_lightning.common.untyped import Tree
from kdrl_lightning.errors import ConfigurationError

PROGRAM = "python -m kdrl_lightning"
# Folder -> heading in the list. Files in folders called base are not listed: others build on them.
HEADINGS = {
    "": "Methods on the built-in task. Each runs on a CPU as it is, without a download.",
    "self_teachers": "Methods whose teacher is the student itself, on the built-in task.",
    "engine": "Engines that sample or score. Add one to a method with a second --config.",
    "hardware": "GPUs and nodes. Add one to a method with a second --config.",
    "recipes": "The papers' settings, with their models and data.",
}
# Class -> what it needs, as the list says it.
NEEDS = {
    "VLLMEngine": "vLLM",
    "VLLMServerEngine": "a vLLM server",
    "ServerTeacher": "a vLLM server",
    "HFPrompts": "the extra `tasks`",
    "StreamedHFPrompts": "the extra `tasks`",
    "ReasoningGymPrompts": "the extra `tasks`",
    "MathReward": "the extra `tasks`",
    "GGUFModel": "the extra `gguf`",
}
HOW_TO = f"""\
Run one:   {PROGRAM} fit --config rlad --config engine/vllm
Read one:  {PROGRAM} configs show rlad
Edit one:  {PROGRAM} configs copy rlad --output my_rlad.yaml"""
FIRST_SENTENCE = re.compile(r".*?\.(?=\s|$)|.*")
BASE_LINE = re.compile(r"^base: *(\S+)", re.M)


def configs(args: Sequence[str]) -> None:
    """List, show or copy configurations.

    Args:
        args: the command line after ``configs``.

    Raises:
        ConfigurationError: there is no such configuration, or the copy would overwrite a file.
    """
    settings = parser().parse_args(list(args))
    if settings.action == "show":
        print(resolved(settings.name) if settings.resolved else text_of(settings.name), end="")
    elif settings.action == "copy":
        written = copy(settings.name, settings.output)
        print(f"written: {', '.join(str(file) for file in written)}")
        print(f"Run it with `{PROGRAM} fit --config {written[0]}`.")
    else:
        print(listing(shutil.get_terminal_size((100, 24)).columns))


def parser() -> PlainParser:
    """Return the parser of the subcommand."""
    words = "List, show and copy the configurations that come with the library."
    made = PlainParser(f"{PROGRAM} configs", description=words, allow_abbrev=False)
    actions = made.add_subparsers(dest="action", metavar="{list,show,copy}")
    actions.add_parser("list", help="list all configurations, and what each needs (the default)")
    show = actions.add_parser("show", help="print a configuration")
    show.add_argument("name", help="such as rlad or engine/vllm")
    show.add_argument(
        "--resolved", action="store_true", help="print it merged with the files it builds on"
    )
    copied = actions.add_parser("copy", help="copy a configuration, and the files it builds on")
    copied.add_argument("name", help="such as rlad or engine/vllm")
    copied.add_argument(
        "--output", type=Path, help="path of the copy; default: NAME.yaml in this folder"
    )
    return made


def listing(width: int) -> str:
    """Return the list of configurations, by kind, with what each does and needs.

    Args:
        width: width of the terminal, in columns.
    """
    shown = [name for name in names() if "base" not in name.split("/")]
    out: list[str] = []
    for folder, heading in HEADINGS.items():
        inside = [n for n in shown if n.rpartition("/")[0].split("/")[0] == folder]
        out += [heading, *_entries(inside, width), ""]
    return "\n".join([*out, HOW_TO])


def _entries(inside: Sequence[str], width: int) -> Iterator[str]:
    indent = max(len(name) for name in inside) + 4
    for name in inside:
        yield from textwrap.wrap(
            describe(name),
            max(width - 1, indent + 30),
            initial_indent=f"  {name}".ljust(indent),
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
        )


def describe(name: str) -> str:
    """Return the first sentence of a configuration's comment, and what the configuration needs.

    >>> describe("engine/vllm")
    'vLLM samples rollouts in the training process. Needs vLLM.'
    """
    comment: list[str] = []
    for line in text_of(name).splitlines():
        if not line.startswith("# "):
            break
        comment.append(line[2:].strip())
    sentence = FIRST_SENTENCE.match(" ".join(comment))
    words = sentence[0] if sentence else ""
    needs = list(dict.fromkeys(needs_of(load(name))))
    return f"{words} Needs {', '.join(needs)}." if needs else words


def needs_of(settings: Tree) -> Iterator[str]:
    """Yield what merged settings need beyond a CPU and the library."""
    trainer = settings.get("trainer") or {}
    if trainer.get("accelerator") == "gpu":
        devices = trainer.get("devices")
        yield "a GPU" if devices == 1 else f"{devices} GPUs"
    if trainer.get("num_nodes"):
        yield f"{trainer['num_nodes']} nodes"
    if isinstance((settings.get("model") or {}).get("student"), str):
        yield "the model hub"
    for name in class_names(settings):
        if name in NEEDS:
            yield NEEDS[name]


def class_names(value: object) -> Iterator[str]:
    """Yield the names of all classes in settings, without their modules."""
    if isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield value["class_path"].rsplit(".", 1)[-1]
        for inner in value.values():
            yield from class_names(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from class_names(inner)


def text_of(name: str) -> str:
    """Return a configuration's text."""
    return require(name).read_text(encoding="utf-8")


def load(name: str) -> Tree:  # as PyYAML returns it
    """Return a configuration's settings, merged over those of the files that it builds on."""
    settings: Tree = load_with_base(text_of(name), str(require(name)))
    return settings


def resolved(name: str) -> str:
    """Return a configuration as one YAML text, merged with the files that it builds on."""
    return dump(load(name))


def copy(name: str, output: Path | None) -> list[Path]:
    """Copy a configuration with the files that it builds on, comments included.

    These files go into a folder next to the copy, ``<copy>_bases``, and keep their names.

    Args:
        name: name of the configuration.
        output: path of the copy; None: the last part of the name, in the working directory.

    Returns:
        The paths of the written files; the copy comes first.

    Raises:
        ConfigurationError: there is no such configuration, or a file is already there.
    """
    source = require(name)
    target = output or Path(source.name)
    folder = target.with_name(f"{target.stem}_bases")
    for there in (target, folder):
        if there.exists():
            raise ConfigurationError(
                f"`--output` must name a new file: got {there}, which exists. Name another, or "
                "remove it."
            )
    text = source.read_text(encoding="utf-8")
    bases = bases_of(source)
    if bases:
        nearest = folder.name / bases[0].relative_to(FOLDER.resolve())
        text = BASE_LINE.sub(f"base: {nearest.as_posix()}", text, count=1)
    copies = {folder / base.relative_to(FOLDER.resolve()): base for base in bases}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    for file, base in copies.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base, file)
    return [target, *copies]


def bases_of(file: Path) -> list[Path]:
    """Return the files that a configuration builds on; the nearest comes first."""
    found = BASE_LINE.search(file.read_text(encoding="utf-8"))
    if found is None:
        return []
    base = (file.parent / found[1]).resolve()
    return [base, *bases_of(base)]
