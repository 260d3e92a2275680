"""A folder that is made once: complete with checksums, or not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from kdrl_lightning.errors import ConfigurationError

MANIFEST = "checksums.json"


def cache_root() -> Path:
    """``$KDRL_LIGHTNING_CACHE``, else ``kdrl_lightning`` in the user's cache folder."""
    own = os.environ.get("KDRL_LIGHTNING_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kdrl_lightning"


def cached_folder(name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder ``name`` of the cache, made by ``make`` unless a sound copy is there.

    It is written elsewhere, given checksums, and moved into place; one process makes it while
    others wait. A broken or half-written copy is made anew.
    """
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"the cache folder must be writable: got {root} ({error.strerror}). "
            "Set KDRL_LIGHTNING_CACHE to another one."
        ) from error
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if is_sound(folder):
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=f"{name}.part-") as part:
            made = Path(part) / "folder"
            made.mkdir()
            make(made)
            (made / MANIFEST).write_text(json.dumps(checksums(made), indent=1))
            os.replace(made, folder)
    return folder


def is_sound(folder: Path) -> bool:
    """Whether every file of the manifest is there and unchanged."""
    try:
        expected = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return bool(expected) and checksums(folder) == expected


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file but the manifest."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
