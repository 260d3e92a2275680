"""Checkpoints on disk: complete or absent, and read without executing code in them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from helpers.sharded_trainer import sharded_trainer
from kdrl_lightning.checkpoints.layout import META, SHARDS, unfinished
from kdrl_lightning.checkpoints.reader import check_shards, read_metadata
from kdrl_lightning.checkpoints.writer import CheckpointWriter, save_file
from kdrl_lightning.cli.export import student_weights
from kdrl_lightning.errors import ConfigurationError, TrainingStopped


def test_a_save_that_is_cut_short_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "step=00000002.ckpt"
    save_file({"loops": 1}, file)
    before, real = file.read_bytes(), torch.save

    def half(state: Any, target: Any) -> None:
        real(state, target)
        target.truncate(target.tell() // 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        save_file({"loops": 2}, file)
    assert file.read_bytes() == before and not unfinished(file).exists()
    monkeypatch.undo()
    unfinished(file).write_bytes(before[:9])  # as a kill leaves it
    save_file({"loops": 3}, file)
    assert torch.load(file) == {"loops": 3} and not unfinished(file).exists()


def test_bytes_are_on_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename may reach the disk before the bytes, unless they are forced there first."""
    done: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        kind = "folder" if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir() else "bytes"
        done.append(kind)
        real_sync(descriptor)

    def replace(old: Any, new: Any) -> None:
        done.append("name")
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    save_file({}, tmp_path / "a.ckpt")
    assert done == ["bytes", "name", "folder"]


class Runs:
    """A pickle that would run a command."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.flag}",)


def refused(path: Path, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as error:
        read_metadata(str(path))
    text = str(error.value)
    assert "\n" not in text and str(path) in text and text.startswith("`ckpt_path` must be")


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    file, flag = tmp_path / "step=00000002.ckpt", tmp_path / "flag"
    save_file({"loops": {}, "state_dict": {"w": torch.zeros(5000)}}, file)
    whole = file.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(file, r"an intact checkpoint of this library.*Use an earlier one")
    file.write_bytes(b"not a checkpoint at all\n" * 50)
    refused(file, "an intact checkpoint of this library")
    torch.save({"loops": Runs(flag)}, file)
    refused(file, "an intact checkpoint of this library")
    file.write_bytes(pickle.dumps({"loops": Runs(flag)}))
    refused(file, "an intact checkpoint of this library")
    for other in ([1, 2], {"weights": torch.zeros(2)}):
        torch.save(other, file)
        refused(file, r"a checkpoint of a run.*give it as `model.student`")
    refused(tmp_path / "nothing.ckpt", "an intact checkpoint of this library")
    assert not flag.exists()


# ---- folders of shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "step=00000004.ckpt"
    CheckpointWriter().write(sharded_trainer(), path)
    return path


@pytest.fixture
def group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


def check_folder(path: Path, step: int) -> None:
    saved = read_metadata(str(path))
    assert saved["global_step"] == step and "state_dict" not in saved
    weights = student_weights(path, saved)
    assert weights.keys() == {"w"}
    assert torch.equal(weights["w"], torch.arange(6.0).reshape(2, 3) + step)


@pytest.mark.filterwarnings("ignore:torch.distributed is .*:UserWarning")
def test_a_folder_of_shards(folder: Path) -> None:
    check_folder(folder, 4)
    assert {p.name for p in folder.iterdir()} == {META, SHARDS, "__0_0.distcp"}
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    CheckpointWriter().write(sharded_trainer(5), folder)  # over an earlier one
    check_folder(folder, 5)


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")
def test_a_folder_is_written_aside_of_training(tmp_path: Path, group: None) -> None:
    writer, trainer = CheckpointWriter(asynchronous=True), sharded_trainer()
    path = tmp_path / "step=00000004.ckpt"
    weights = trainer._checkpoint_connector.dump_checkpoint(False)["state_dict"]["student.model.w"]
    writer.write(trainer, path)
    weights.zero_()  # the next update
    assert not path.exists() and unfinished(path).exists()
    writer.wait(trainer)
    check_folder(path, 4)


@pytest.mark.filterwarnings("ignore:torch.distributed is .*:UserWarning")
def test_a_folder_that_cannot_be_written_stops_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", full)
    words = r"a checkpoint must be writable: got OSError: .*No space left on device at step 5\."
    with pytest.raises(TrainingStopped, match=words) as error:
        CheckpointWriter().write(sharded_trainer(5), folder)
    assert "\n" not in str(error.value)
    check_folder(folder, 4)


@pytest.mark.filterwarnings("ignore:torch.distributed is .*:UserWarning")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        (META, r"meta\.pt is missing: the run did not finish it"),
        (SHARDS, r"\.metadata is missing: the run did not finish it"),
        ("__0_0.distcp", r"__0_0\.distcp has -1 bytes, too few"),
    ],
)
def test_folders_that_are_not_whole_are_refused(folder: Path, name: str, words: str) -> None:
    file = folder / name
    whole = file.read_bytes()
    file.unlink()
    refused(folder, words)
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(folder, "an intact checkpoint of this library")
        if name == "__0_0.distcp":  # known before anything is read
            refused(folder, rf"__0_0\.distcp has {size} bytes, too few")


@pytest.mark.filterwarnings("ignore:torch.distributed is .*:UserWarning")
@pytest.mark.parametrize(
    "names",
    [
        ("posix", "system"),
        ("torch", "os.system"),  # a module that torch has imported
        ("torch.hub", "sys.exit"),
        ("pathlib", "os.system"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch", "load"),
        ("builtins", "eval"),
    ],
)
def test_an_index_that_would_run_something_is_refused(
    folder: Path, tmp_path: Path, names: tuple[str, str]
) -> None:
    flag = tmp_path / "flag"
    text = f"touch {flag}".encode()
    code = b"\x80\x04"
    for word in names:
        code += b"\x8c" + bytes([len(word)]) + word.encode()
    code += b"\x93\x8c" + bytes([len(text)]) + text + b"\x85R."
    (folder / SHARDS).write_bytes(code)
    refused(folder, rf"its index names {names[0]}\.{names[1]}")
    assert not flag.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is .*:UserWarning")
@pytest.mark.parametrize("index", [b"", b"N.", b"\x80\x04", b"abc", b"ctorch\nnothing\n."])
def test_an_index_that_is_none_is_refused(folder: Path, index: bytes) -> None:
    (folder / SHARDS).write_bytes(index)
    refused(folder, "an intact checkpoint of this library")


@pytest.mark.filterwarnings("ignore:torch.distributed is .*:UserWarning")
def test_a_shard_that_would_run_something_is_refused(tmp_path: Path) -> None:
    """torch unpickles what is no tensor, e.g. an optimizer's settings, without asking."""
    flag, trainer, path = tmp_path / "flag", sharded_trainer(), tmp_path / "step=00000004.ckpt"
    state = trainer._checkpoint_connector.dump_checkpoint(False)
    state["optimizer_states"][0]["settings"]["lr"] = Runs(flag)
    CheckpointWriter().write(trainer, path)
    refused(path, "an intact checkpoint of this library")
    assert not flag.exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is .*:UserWarning")
def test_every_part_of_a_folder_is_looked_for(folder: Path) -> None:
    check_shards(folder)
    with pytest.raises(ValueError, match="is missing"):
        check_shards(folder.parent)
