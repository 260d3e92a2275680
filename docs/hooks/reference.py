"""Site hook: generate the API reference, one page per entry of `ROOMS`, and a list of names."""

from __future__ import annotations

import importlib
import re

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGE = "kdrl_lightning"
# Page -> title and the modules whose public names it shows.
ROOMS = {
    "objectives": ("Objectives", ["objectives"]),
    "losses": ("Losses", ["losses", "losses.advantages"]),
    "teachers": ("Teachers", ["teachers"]),
    "engines": ("Engines", ["engines"]),
    "prompts": ("Prompts", ["prompts"]),
    "rewards": ("Rewards", ["rewards"]),
    "callbacks": ("Callbacks", ["callbacks"]),
    "schedules": ("Schedules", ["callbacks.schedules"]),
    "metrics": ("Metrics and evaluation", ["metrics", "evaluation"]),
    "tiny": ("Embedded task", ["tiny"]),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the reference to the site."""
    package = griffe.load(PACKAGE, search_paths=[config.config_file_path.rpartition("/")[0]])
    assert isinstance(package, griffe.Module)
    pages = {name: room_page(package, *room) for name, room in ROOMS.items()}
    pages["names"] = names_page(package)
    for name, text in pages.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def room_page(package: griffe.Module, title: str, modules: list[str]) -> str:
    """Return a page with the docstrings of some modules' public names."""
    lines = [f"# {title}", ""]
    for name in modules:
        module = package[name]
        lines += [f"## `{module.path}`", "", module.docstring.value, ""]
        lines += [f"::: {module.path}.{member}\n" for member in public_names(module)]
    return "\n".join(lines)


def names_page(package: griffe.Module) -> str:
    """Return a page that lists the package's names, and describes those without another page."""
    shown = {
        package[name][member].canonical_path
        for _, modules in ROOMS.values()
        for name in modules
        for member in public_names(package[name])
    }
    exported = importlib.import_module(PACKAGE).__all__  # only importing the package builds it
    members = [package[name] for name in exported if name != "__version__"]
    lines = [f"# Names of `{PACKAGE}`", "", package.docstring.value, ""]
    lines += ["| name | what it is |", "| --- | --- |"]
    for member in members:
        first = member.docstring.value.split("\n\n")[0].replace("\n", " ")
        lines.append(f"| [`{member.name}`][{member.canonical_path}] | {escaped(first)} |")
    rest = [m for m in members if m.canonical_path not in shown]
    return "\n".join([*lines, "", *(f"::: {m.canonical_path}\n" for m in rest)])


def escaped(cell: str) -> str:
    """Return text for a table cell: ``|`` is escaped, except inside code."""
    return re.sub(r"(`+[^`]*`+)|\|", lambda match: match[1] or "\\|", cell)


def public_names(module: griffe.Module) -> list[str]:
    """Return what a module exports, in the order of its ``__all__``, or else what it defines."""
    if module.exports is not None:
        return [str(name) for name in module.exports if is_described(module[str(name)])]
    own = [name for name, member in module.members.items() if not member.is_alias]
    return [name for name in own if not name.startswith("_") and is_described(module[name])]


def is_described(member: griffe.Object | griffe.Alias) -> bool:
    """Tell whether a member gets an entry: classes and functions do."""
    return member.is_class or member.is_function
