"""A cached folder is complete or absent."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kdrl_lightning.models.folder_cache import (
    MANIFEST,
    cache_root,
    cached_folder,
    checksums,
    is_sound,
)

CONTENT = {"config.json": b'{"a": 1}', "model.bin": bytes(range(256)), "sub/more.txt": b"more"}


class Maker:
    """Writes the content, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        assert not list(folder.iterdir())
        for name, content in CONTENT.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in CONTENT}


def left(cache_folder: Path) -> set[str]:
    """What is in the cache besides locks."""
    return {path.name for path in cache_folder.iterdir() if path.suffix != ".lock"}


def test_a_folder_is_made_once(cache_folder):
    make = Maker()
    first = cached_folder("thing", make)
    assert cached_folder("thing", make) == first == cache_folder / "thing"
    assert make.calls == 1
    assert content(first) == CONTENT
    assert left(cache_folder) == {"thing"}


def test_names_do_not_share_a_folder(cache_folder):
    make = Maker()
    assert cached_folder("one", make) != cached_folder("two", make)
    assert make.calls == 2


def test_the_manifest_lists_every_other_file(cache_folder):
    folder = cached_folder("thing", Maker())
    manifest = json.loads((folder / MANIFEST).read_text())
    assert set(manifest) == set(CONTENT)
    assert manifest == checksums(folder)
    # echo -n more | sha256sum
    assert manifest["sub/more.txt"] == (
        "187897ce0afcf20b50ba2b37dca84a951b7046f29ed5ab94f010619f69d6e189"
    )


def change_a_byte(folder: Path) -> None:
    data = bytearray((folder / "model.bin").read_bytes())
    data[100] ^= 1
    (folder / "model.bin").write_bytes(data)


def remove_all(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


BREAKS: dict[str, Callable[[Path], object]] = {
    "a changed byte": change_a_byte,
    "a cut file": lambda f: (f / "model.bin").write_bytes(CONTENT["model.bin"][:-1]),
    "a missing file": lambda f: (f / "sub" / "more.txt").unlink(),
    "a file too many": lambda f: (f / "extra").write_text("?"),
    "a missing manifest": lambda f: (f / MANIFEST).unlink(),
    "a cut manifest": lambda f: (f / MANIFEST).write_text('{"config.json": '),
    "an empty manifest": lambda f: (f / MANIFEST).write_text("{}"),
    "a manifest of another kind": lambda f: (f / MANIFEST).write_text("[1]"),
    "an empty folder": remove_all,
}


@pytest.mark.parametrize("harm", BREAKS)
def test_a_broken_folder_is_made_anew(cache_folder, harm):
    make = Maker()
    folder = cached_folder("thing", make)
    BREAKS[harm](folder)
    assert not is_sound(folder)
    assert cached_folder("thing", make) == folder
    assert make.calls == 2
    assert is_sound(folder) and content(folder) == CONTENT
    assert not (folder / "extra").exists()
    assert left(cache_folder) == {"thing"}


def test_a_folder_that_was_deleted_is_made_anew(cache_folder):
    make = Maker()
    folder = cached_folder("thing", make)
    remove_all(folder)
    folder.rmdir()
    assert content(cached_folder("thing", make)) == CONTENT


def fail(folder: Path) -> None:
    (folder / "half").write_text("half")
    raise RuntimeError("no luck")


def test_a_failing_make_leaves_nothing_behind(cache_folder):
    with pytest.raises(RuntimeError, match="no luck"):
        cached_folder("thing", fail)
    assert left(cache_folder) == set()


def test_after_a_failure_it_can_be_made(cache_folder):
    with pytest.raises(RuntimeError, match="no luck"):
        cached_folder("thing", fail)
    assert content(cached_folder("thing", Maker())) == CONTENT


def test_a_failing_make_does_not_harm_other_folders(cache_folder):
    other = cached_folder("other", Maker())
    with pytest.raises(RuntimeError, match="no luck"):
        cached_folder("thing", fail)
    assert is_sound(other) and left(cache_folder) == {"other"}


def test_an_interrupted_make_leaves_nothing_behind(cache_folder):
    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder("thing", interrupted)
    assert left(cache_folder) == set()


def test_nothing_stands_at_the_name_while_it_is_made(cache_folder):
    def make(folder: Path) -> None:
        assert folder != cache_folder / "thing"
        assert not (cache_folder / "thing").exists()
        (folder / "a").write_text("a")

    assert (cached_folder("thing", make) / "a").read_text() == "a"


def test_one_makes_it_while_others_wait(cache_folder):
    make, folders = Maker(), []

    def slow(folder: Path) -> None:
        time.sleep(0.05)
        make(folder)

    threads = [
        threading.Thread(target=lambda: folders.append(cached_folder("thing", slow)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [cache_folder / "thing"] * 4
    assert make.calls == 1


def test_a_folder_that_is_not_there_is_not_sound(tmp_path):
    assert not is_sound(tmp_path / "none")


def test_a_folder_with_an_empty_manifest_alone_is_not_sound(tmp_path):
    (tmp_path / MANIFEST).write_text("{}")
    assert not is_sound(tmp_path)


def test_the_own_variable_names_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KDRL_LIGHTNING_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "own"


@pytest.mark.parametrize("own", [None, ""])
def test_else_it_lies_in_the_users_cache(monkeypatch, tmp_path, own):
    monkeypatch.delenv("KDRL_LIGHTNING_CACHE", raising=False)
    if own is not None:
        monkeypatch.setenv("KDRL_LIGHTNING_CACHE", own)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "kdrl_lightning"


@pytest.mark.parametrize("xdg", [None, ""])
def test_else_in_the_home_folder(monkeypatch, tmp_path, xdg):
    monkeypatch.delenv("KDRL_LIGHTNING_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "kdrl_lightning"
