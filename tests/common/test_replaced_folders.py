"""Replacing a folder: whatever interrupts it, a complete folder has the name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrl_lightning.checkpoints.layout import remove_unfinished
from kdrl_lightning.checkpoints.writer import save_file
from kdrl_lightning.common import folders
from kdrl_lightning.common.folders import exchange, replace_folder


def made(path: Path, text: str) -> Path:
    path.mkdir()
    for name in ("a", "b"):
        (path / name).write_text(text)
    return path


def content(path: Path) -> set[str]:
    assert sorted(p.name for p in path.iterdir()) == ["a", "b"]
    return {p.read_text() for p in path.iterdir()}


def interrupted(after: int, calls: list[str], module: Any, name: str) -> Any:
    """Return a function that raises KeyboardInterrupt in place of one of the calls."""
    real = getattr(module, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    return call


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("after", range(6))
def test_an_interruption_at_any_call_leaves_a_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool, after: int
) -> None:
    new, path = made(tmp_path / "new", "new"), made(tmp_path / "x", "old")
    if not exchanges:
        monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    with monkeypatch.context() as patch:
        calls: list[str] = []
        patch.setattr(shutil, "rmtree", interrupted(after, calls, shutil, "rmtree"))
        replace = interrupted(after, calls, os, "replace")
        # What repairs is not interrupted a second time.
        patch.setattr(
            os, "replace", lambda a, b: (os.rename if len(calls) > after else replace)(a, b)
        )
        try:
            replace_folder(new, path)
            stopped = False
        except KeyboardInterrupt:
            stopped = True
    assert content(path) in ({"old"}, {"new"})
    assert stopped == (after < len(calls))
    if not stopped:
        assert content(path) == {"new"} and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_folder_that_replaces_none(tmp_path: Path) -> None:
    replace_folder(made(tmp_path / "new", "new"), tmp_path / "x")
    assert content(tmp_path / "x") == {"new"} and not (tmp_path / "new").exists()


def test_this_system_exchanges_folders(tmp_path: Path) -> None:
    one, other = made(tmp_path / "1", "one"), made(tmp_path / "2", "other")
    assert not exchange(one, tmp_path / "missing")
    if exchange(one, other):
        assert (content(one), content(other)) == ({"other"}, {"one"})


def test_a_folder_that_a_kill_left_without_its_name_returns(tmp_path: Path) -> None:
    made(tmp_path / "a.ckpt.old", "a")
    made(tmp_path / "b.ckpt.old", "old")
    made(tmp_path / "b.ckpt", "b")
    made(tmp_path / "a.ckpt.unfinished", "half")
    remove_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ckpt", "b.ckpt"]
    assert (content(tmp_path / "a.ckpt"), content(tmp_path / "b.ckpt")) == ({"a"}, {"b"})


def test_a_checkpoint_that_ctrl_c_cuts_off_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"x": 1}, tmp_path / "a.ckpt")

    def save(state: Any, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(KeyboardInterrupt):
            save_file({"x": 2}, tmp_path / "a.ckpt")
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]
    assert torch.load(tmp_path / "a.ckpt") == {"x": 1}
