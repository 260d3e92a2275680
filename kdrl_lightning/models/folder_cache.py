"""A cache of folders on disk, each created once and verified by checksums."""

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
    """Return ``$KDRL_LIGHTNING_CACHE``, else ``kdrl_lightning`` in the user's cache folder."""
    chosen = os.environ.get("KDRL_LIGHTNING_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kdrl_lightning"


def cached_folder(name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder ``name`` of the cache; ``make`` fills it if there is no intact copy.

    We fill a temporary folder, add checksums, and move it into place, so that readers never see
    half a folder. One process fills it while others wait. A damaged copy is replaced.

    Args:
        name: name of the folder in the cache.
        make: writes the content into the empty folder that it gets.

    Raises:
        ConfigurationError: the cache cannot be created.
    """
    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"the cache folder must be writable: got {root} ({error.strerror}). "
            "Set KDRL_LIGHTNING_CACHE to another folder."
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
    """Return whether every file of the manifest exists and is unchanged."""
    try:
        expected = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return bool(expected) and checksums(folder) == expected


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file but the manifest, by its path in the folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
