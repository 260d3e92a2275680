"""Finds the configurations of the library by name, as in ``--config rlad``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from kdrl_lightning.cli.settings.unused import note
from kdrl_lightning.errors import ConfigurationError

FOLDER = Path(__file__).parents[1] / "configs"
SUFFIXES = ("", ".yaml")
# jsonargparse also accepts YAML text in place of a file; we take text with one of these for YAML.
YAML_SIGNS = re.compile(r"[\n:{\[]")
LIST = "`python -m kdrl_lightning configs` lists all configurations of the library."


def names() -> list[str]:
    """Return the names of all shipped configurations, such as ``rlad`` and ``engine/vllm``.

    >>> "rlad" in names(), "engine/vllm" in names(), "base/embedded" in names()
    (True, True, True)
    """
    files = (path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml"))
    return sorted((name.removesuffix(".yaml") for name in files), key=lambda n: ("/" in n, n))


def find(name: str) -> Path | None:
    """Return the shipped file that a name means, or None.

    Args:
        name: such as ``rlad``, ``engine/vllm.yaml`` or ``configs/rlad.yaml``.
    """
    inside = Path(name.removeprefix("configs/"))
    if inside.is_absolute() or ".." in inside.parts:
        return None
    files = (FOLDER / f"{inside}{suffix}" for suffix in SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def require(name: str) -> Path:
    """Return the shipped file that a name means.

    Raises:
        ConfigurationError: there is none.
    """
    found = find(name)
    if found is None:
        raise ConfigurationError(
            f"the configuration must be one of the library's: got {name}. {cure(name)}"
        )
    return found


def config_file(name: str) -> Path:
    """Return the file that ``--config NAME`` means: the user's file, else a shipped one.

    If the user's file hides a shipped configuration of the same name, the run prints a note.

    Raises:
        ConfigurationError: there is no such file.
    """
    shipped = find(name)
    here = next((Path(name + suffix) for suffix in SUFFIXES if Path(name + suffix).is_file()), None)
    if here is not None:
        asked_by_name = not name.endswith(".yaml")
        if shipped and asked_by_name and here.read_bytes() != shipped.read_bytes():
            note(f"`--config {name}` is your file {here}, not the configuration of the library.")
        return here
    if Path(name).is_dir():
        raise ConfigurationError(
            f"`config` must be a file: got {name}, a folder. {folder_cure(name)}"
        )
    if shipped is None:
        raise ConfigurationError(
            f"`config` must be a YAML file, or name a configuration of the library: got {name}. "
            f"{cure(name)}"
        )
    return shipped


def folder_cure(name: str) -> str:
    """Return advice for a user who gave a folder in place of a file."""
    if find(name):
        return f"Write {name}.yaml for the library's configuration."
    return "Name a file in it."


def cure(name: str) -> str:
    """Return advice for a user who gave an unknown name."""
    wanted = name.removeprefix("configs/").removesuffix(".yaml")
    last = {known.rsplit("/", 1)[-1]: known for known in reversed(names())}
    close = get_close_matches(wanted, names(), n=2) or get_close_matches(wanted, last, n=2)
    if not close:
        return LIST
    return f"Did you mean {' or '.join(last.get(word, word) for word in close)}? {LIST}"


def with_files(args: Sequence[str]) -> list[str]:
    """Return a command line in which paths replace the names after ``--config``.

    >>> with_files(["fit", "--config", "rlad", "--config={data: {group_size: 4}}"])[2][-17:]
    'configs/rlad.yaml'
    """
    out: list[str] = []
    for word in args:
        if out and out[-1] in ("--config", "-c"):
            out.append(_file(word))
        elif word.startswith("--config="):
            out.append(f"--config={_file(word.removeprefix('--config='))}")
        else:
            out.append(word)
    return out


def _file(value: str) -> str:
    if not value.strip():
        raise ConfigurationError(f"`--config` must name a configuration: got {value!r}. {LIST}")
    return value if YAML_SIGNS.search(value) else str(config_file(value))
