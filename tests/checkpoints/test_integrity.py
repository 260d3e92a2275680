"""Damage of any byte is noticed, and a folder appears complete or not at all."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.checkpoint as dcp

from helpers.sharded_trainer import sharded_trainer
from kdrl_lightning.__main__ import main
from kdrl_lightning.callbacks import FSDPCheckpoint
from kdrl_lightning.checkpoints.integrity import (
    SEAL,
    Part,
    check_archive,
    check_seal,
    seal,
    whole_folder,
)
from kdrl_lightning.checkpoints.layout import META, SHARDS
from kdrl_lightning.checkpoints.reader import newest_whole, read_metadata
from kdrl_lightning.checkpoints.writer import CheckpointWriter, ShardWriter, save_file
from kdrl_lightning.cli.export import student_weights
from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.trainer.failures import reason_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is .*:UserWarning")
WEIGHTS = torch.arange(300.0)


def single(path: Path, step: int = 4) -> Path:
    save_file({"loops": {}, "global_step": step, "state_dict": {"student.model.w": WEIGHTS}}, path)
    return path


def folder(path: Path, step: int = 4) -> Path:
    CheckpointWriter().write(sharded_trainer(step), path)
    return path


def flipped(file: Path, places: range) -> Iterator[int]:
    """Flip one bit after another, each alone."""
    whole = file.read_bytes()
    for place in places:
        raw = bytearray(whole)
        raw[place] ^= 1 << place % 8
        file.write_bytes(raw)
        yield place
    file.write_bytes(whole)


def harmless(path: Path, wanted: dict[str, torch.Tensor]) -> bool:
    """Whether a checkpoint is read; it must then hold the right weights."""
    try:
        saved = read_metadata(str(path))
    except ConfigurationError as error:
        text = str(error)
        assert text.startswith(
            f"`ckpt_path` must be an intact checkpoint of this library: got {path}"
        )
        assert "\n" not in text
        return False
    assert saved["global_step"] == 4
    weights = student_weights(path, saved)
    assert weights.keys() == wanted.keys() and all(
        torch.equal(weights[n], wanted[n]) for n in wanted
    )
    return True


def test_a_bit_that_flips_in_a_file_changes_nothing_in_silence(tmp_path: Path) -> None:
    file = single(tmp_path / "step=00000004.ckpt")
    size = file.stat().st_size
    start = file.read_bytes().index(WEIGHTS.numpy().tobytes())
    read = {p for p in flipped(file, range(0, size, 7)) if harmless(file, {"w": WEIGHTS})}
    assert not read & set(range(start, start + 1200))  # no weight
    assert len(read) < size / 7 / 2  # what is read was hit in unused bytes between the records
    assert harmless(file, {"w": WEIGHTS})


@pytest.mark.parametrize("name", [META, SHARDS, "__0_0.distcp"])
def test_a_bit_that_flips_in_a_folder_changes_nothing_in_silence(tmp_path: Path, name: str) -> None:
    path = folder(tmp_path / "step=00000004.ckpt")
    weights = {"w": torch.arange(6.0).reshape(2, 3) + 4}
    size = (path / name).stat().st_size
    read = [p for p in flipped(path / name, range(0, size, 37)) if harmless(path, weights)]
    assert len(read) < size / 37 / 2
    if name == SHARDS:  # all but the words that introduce the checksum
        end = size - 8 - len(SEAL)
        assert set(read) <= set(range(end, size - 8))
    assert harmless(path, weights)


def test_the_message_names_the_file_and_the_cure(tmp_path: Path) -> None:
    old, newer, newest = (single(tmp_path / f"step={n:08d}.ckpt", n) for n in (2, 4, 6))
    for age, path in enumerate((old, newer, newest)):
        os.utime(path, (1000 + age, 1000 + age))
    for path in (newer, newest):
        raw = path.read_bytes()
        at = raw.index(WEIGHTS.numpy().tobytes()) + 40
        path.write_bytes(raw[:at] + b"\xff" + raw[at + 1 :])
    words = (
        rf"got {newest} \(step=00000006\.ckpt is damaged: .*data/0 does not match its checksum\)\. "
        rf"Use an earlier one: `--ckpt_path {old}`\."
    )
    with pytest.raises(ConfigurationError, match=words):
        read_metadata(str(newest))
    assert newest_whole([old, newer, newest])[0] == old
    old.unlink()
    words = r"Use an earlier one of another run: this folder holds no other intact one\.$"
    with pytest.raises(ConfigurationError, match=words):
        read_metadata(str(newest))
    assert newest_whole([newer, newest])[0] is None


@pytest.mark.parametrize("make", [single, folder])
def test_last_passes_over_broken_ones_and_says_so(tmp_path: Path, make: Any) -> None:
    paths = [make(tmp_path / f"step={n:08d}.ckpt", n) for n in (2, 4, 6)]
    for age, path in enumerate(paths):
        os.utime(path, (1000 + age, 1000 + age))
    saver = FSDPCheckpoint(str(tmp_path))
    trainer = pl.Trainer(logger=False, callbacks=[saver], accelerator="cpu")
    assert saver._find_last_checkpoints(trainer) == {str(paths[2])}
    for path in paths[1:]:
        file = path if path.is_file() else path / "__0_0.distcp"
        raw, times = file.read_bytes(), (path.stat().st_atime, path.stat().st_mtime)
        file.write_bytes(raw[: len(raw) // 2])
        os.utime(path, times)
    with pytest.warns(UserWarning, match=r"`--ckpt_path last` skips .* and takes") as said:
        assert saver._find_last_checkpoints(trainer) == {str(paths[0])}
    texts = [str(w.message) for w in said]
    assert [str(p) in t and str(paths[0]) in t for p, t in zip(paths[:0:-1], texts, strict=True)]


def test_an_index_of_an_earlier_version_has_no_checksum(tmp_path: Path) -> None:
    path = folder(tmp_path / "step=00000004.ckpt")
    raw = (path / SHARDS).read_bytes()
    assert raw.count(SEAL) == 1
    (path / SHARDS).write_bytes(raw.partition(SEAL)[0])
    assert harmless(path, {"w": torch.arange(6.0).reshape(2, 3) + 4})


def test_a_seal_is_of_all_bytes_before_it(tmp_path: Path) -> None:
    file = tmp_path / "index"
    file.write_bytes(b"abc" + SEAL + b"def")  # the words may be in it already
    seal(file)
    check_seal(file.read_bytes(), "index")
    for place in range(3):
        raw = bytearray(file.read_bytes())
        raw[place] ^= 1
        with pytest.raises(ValueError, match="index is damaged: it does not match its checksum"):
            check_seal(bytes(raw), "index")


def test_a_part_of_a_file_is_read_like_a_file(tmp_path: Path) -> None:
    file = tmp_path / "all"
    file.write_bytes(bytes(range(100)))
    with file.open("rb") as whole:
        part = Part(whole, 10, 20)
        assert part.read() == bytes(range(10, 30)) and part.read(5) == b""
        assert part.seek(-5, os.SEEK_END) == 15 and part.read(100) == bytes(range(25, 30))
        assert part.seek(3) == 3 and part.seek(2, os.SEEK_CUR) == 5 and part.read(2) == b"\x0f\x10"
        assert part.tell() == 7
        with pytest.raises(ValueError, match="position must not be before the start of the part"):
            part.seek(-1)
        with pytest.raises(ValueError, match="all is cut short or damaged: "):
            check_archive(part, "all")


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("make", [single, folder])
def test_half_a_checkpoint_does_not_keep_a_full_disk_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    path = make(tmp_path / "run/step=00000004.ckpt")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises((OSError, RuntimeError), match="No space left on device"):
        make(tmp_path / "run/step=00000006.ckpt")
    assert [p.name for p in (tmp_path / "run").iterdir()] == [path.name]
    monkeypatch.undo()
    assert read_metadata(str(path))["global_step"] == 4


def test_other_ranks_are_sent_the_systems_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is pickled loses its causes."""

    def write(*_: Any) -> None:
        try:
            full()
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")

    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", write)
    with pytest.raises(OSError, match="No space left on device") as error:
        ShardWriter(tmp_path).write_data(None, None)
    assert "No space" in str(pickle.loads(pickle.dumps(error.value)))
    with pytest.raises(TrainingStopped, match=r"got OSError: .*No space left on device at step 4"):
        folder(tmp_path / "step=00000004.ckpt")


def test_the_systems_reason_is_told_and_not_torchs() -> None:
    try:
        try:
            full()
        finally:
            raise RuntimeError("unexpected pos 704 vs 598\nand more")
    except RuntimeError as error:
        assert reason_of(error) == "OSError: [Errno 28] No space left on device"
    assert reason_of(KeyError("a\nb")) == r"KeyError: 'a\nb'"


@pytest.mark.parametrize("hidden", [False, True])
def test_a_full_disk_under_anything_else_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hidden: bool
) -> None:
    def run(args: Any) -> None:
        try:
            raise OSError(28, "No space left on device", "metrics.csv")
        except OSError as error:
            if hidden:
                raise RuntimeError("a logger's own words") from error
            raise

    monkeypatch.setattr("kdrl_lightning.cli.main.KDRLCLI.run", run)
    with pytest.raises(SystemExit) as stop:
        main(["fit"])
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        "error: the run must be able to use its files: got OSError: [Errno 28] No space left on "
        "device: 'metrics.csv'. Make room, or correct the permissions, and continue with "
        "`--ckpt_path last`.\n"
    )


def test_another_failure_of_the_system_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: Any) -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr("kdrl_lightning.cli.main.KDRLCLI.run", run)
    with pytest.raises(ConnectionResetError):
        main(["fit"])


# ---- folders of models


def model(path: Path, parts: int, value: str, extra: str = "") -> None:
    with whole_folder(path) as half:
        for part in range(parts):
            (half / f"model-{part}.safetensors").write_text(value)
        (half / "config.json").write_text(value)
        if extra:
            (half / extra).mkdir()
            (half / extra / "text").write_text(value)
        assert value == "two" or not list(path.glob("config.json"))


def files(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): p.read_text() for p in path.rglob("*") if p.is_file()}


def test_a_models_folder_is_there_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "out/student"
    model(path, 3, "one", "more")
    assert len(files(path)) == 5
    (path / "notes.md").write_text("mine")
    model(path, 1, "two", "more")
    assert files(path) == {
        "model-0.safetensors": "two",
        "config.json": "two",
        "more/text": "two",
        "notes.md": "mine",
    }
    assert os.listdir(tmp_path / "out") == ["student"]


def test_a_model_that_cannot_be_written_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "student"
    for words in ("no model yet", "a model"):
        before = files(tmp_path)
        with pytest.raises(OSError, match="No space"), whole_folder(path) as half:
            (half / "config.json").write_text("half")
            full()
        assert files(tmp_path) == before, words
        assert not list(tmp_path.rglob("*unfinished*"))
        if not before:
            model(path, 2, "one")
    monkeypatch.chdir(path)
    model(Path("."), 1, "two")  # here
    assert files(path) == {"model-0.safetensors": "two", "config.json": "two"}


def test_a_kill_between_two_models_leaves_no_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, moved = tmp_path / "student", os.replace, 0

    def replace(old: Any, new: Any) -> None:
        nonlocal moved
        moved += 1
        if moved == 3:
            raise KeyboardInterrupt
        real(old, new)

    model(path, 2, "one")
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        model(path, 2, "two")
    assert not list(path.glob("config.json")) and "one" not in files(path).values()


def test_a_model_is_on_the_disk_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real_sync(descriptor)

    def replace(old: Any, new: Any) -> None:
        done.append("name")
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    model(tmp_path / "student", 1, "one")
    assert sorted(done[:2]) == ["config.json", "model-0.safetensors"]
    assert done[2:] == ["name", tmp_path.name]
    done.clear()
    model(tmp_path / "student", 1, "two")
    assert done.index("name") == 2 and done[-3:] == ["name", "student", tmp_path.name]
