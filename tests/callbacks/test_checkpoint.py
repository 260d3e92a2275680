"""FSDPCheckpoint in runs: which checkpoints it keeps, what is in them, and how a run stops."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from helpers.short_runs import make_data, make_module, make_trainer
from kdrl_lightning import KDRL, checkpoints
from kdrl_lightning.callbacks import FSDPCheckpoint
from kdrl_lightning.checkpoints.reader import read_metadata
from kdrl_lightning.errors import ConfigurationError, Interrupted, TrainingStopped

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*of the (completions|groups):UserWarning",
    "ignore:The number of training batches:UserWarning",
)
Folders = tuple[str, str]


@pytest.fixture
def folders(student_folder: str, teacher_folder: str) -> Folders:
    return student_folder, teacher_folder


def fit(
    root: Path,
    folders: Folders,
    saver: FSDPCheckpoint,
    *callbacks: pl.Callback,
    ckpt_path: str | None = None,
    data: dict[str, Any] | None = None,
    **trainer: Any,
) -> pl.Trainer:
    """Eight steps, four rollouts, a validation after every second rollout."""
    out = make_trainer(root, callbacks=[*callbacks, saver], enable_checkpointing=True, **trainer)
    module = make_module(*folders, KDRL(0.5))
    out.fit(module, datamodule=make_data(**(data or {})), ckpt_path=ckpt_path)
    return out


def steps(folder: Path) -> list[int]:
    assert not list(folder.glob("*.unfinished"))
    return sorted(int(p.name.removeprefix("step=").removesuffix(".ckpt")) for p in folder.iterdir())


class Scores(pl.Callback):
    """Lets each validation report the next of given scores."""

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.callback_metrics["val/accuracy"].fill_(self.scores.pop(0))


class At(pl.Callback):
    """Does something after a step, before the checkpoint callback sees it."""

    def __init__(self, step: int, work: Any) -> None:
        self.step, self.work = step, work

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            self.work()


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


# ---- what is kept


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"monitor": None}, [8]),
        ({"monitor": None, "keep_last": 3}, [4, 6, 8]),
        ({"monitor": None, "every_n_rollouts": 3}, [8]),  # the last step counts
        ({"monitor": None, "every_n_rollouts": 3, "keep_last": 9}, [6, 8]),
        ({"save_top_k": 0, "keep_last": 2}, [6, 8]),
        ({"monitor": None, "keep_last": 9, "asynchronous": True}, [2, 4, 6, 8]),
    ],
)
def test_the_newest_are_kept(
    tmp_path: Path, folders: Folders, settings: dict[str, Any], kept: list[int]
) -> None:
    saver = FSDPCheckpoint(**settings)
    fit(tmp_path, folders, saver)
    assert steps(tmp_path / "checkpoints") == kept
    assert [e["step"] for e in saver.entries] == kept
    assert saver.last_model_path == str(tmp_path / "checkpoints/step=00000008.ckpt")


@pytest.mark.parametrize(
    ("mode", "top", "kept", "best"), [("max", 1, [4, 8], 4), ("min", 1, [6, 8], 6),
                                      ("max", 2, [2, 4, 8], 4), ("min", 2, [6, 8], 6)]
)  # fmt: skip
def test_the_best_are_kept(
    tmp_path: Path, folders: Folders, mode: Any, top: int, kept: list[int], best: int
) -> None:
    saver = FSDPCheckpoint(mode=mode, save_top_k=top)
    data = {"rollouts_per_epoch": 1}
    fit(tmp_path, folders, saver, Scores(0.5, 0.75, 0.25, 0.375), data=data)
    assert steps(tmp_path / "checkpoints") == kept
    assert saver.best_model_path.endswith(f"step={best:08d}.ckpt")
    assert saver.best_model_score == {4: 0.75, 6: 0.25}[best]


def test_of_equal_scores_the_newest_is_best(tmp_path: Path, folders: Folders) -> None:
    saver = FSDPCheckpoint()
    data = {"rollouts_per_epoch": 1}
    fit(tmp_path, folders, saver, Scores(0.5, 0.5, 0.5, 0.25), data=data)
    assert steps(tmp_path / "checkpoints") == [6, 8]


def test_an_asynchronous_run_does_not_fill_the_disk(tmp_path: Path, folders: Folders) -> None:
    most = 0

    class Count(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            nonlocal most
            most = max(most, len(list((tmp_path / "checkpoints").glob("step=*.ckpt"))))

    fit(tmp_path, folders, FSDPCheckpoint(monitor=None, asynchronous=True), Count())
    assert most <= 2
    assert steps(tmp_path / "checkpoints") == [8]


def test_a_metric_that_nothing_logs_is_refused(tmp_path: Path, folders: Folders) -> None:
    words = r"`monitor` must be a metric of the validation: got val/luck\. Known: .*val/accuracy"
    with pytest.raises(ConfigurationError, match=words):
        fit(tmp_path, folders, FSDPCheckpoint(monitor="val/luck"))


def test_without_validation_data_the_newest_is_kept(tmp_path: Path, folders: Folders) -> None:
    saver = FSDPCheckpoint()
    fit(tmp_path, folders, saver, data={"val_prompts": None})
    assert steps(tmp_path / "checkpoints") == [8]
    assert (saver.best_model_path, saver.best_model_score) == ("", None)


def test_a_trial_run_writes_nothing(tmp_path: Path, folders: Folders) -> None:
    fit(tmp_path, folders, FSDPCheckpoint(), fast_dev_run=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"save_top_k": -1}, r"`save_top_k` must be at least 0: got -1"),
        ({"keep_last": 0}, r"`keep_last` must be at least 1: got 0"),
        ({"every_n_rollouts": 0}, r"`every_n_rollouts` must be at least 1: got 0"),
        ({"mode": "best"}, r"`mode` must be max or min: got best"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        FSDPCheckpoint(**settings)


def test_the_newest_of_all_versions_is_the_last(tmp_path: Path) -> None:
    saver = FSDPCheckpoint()
    logger = pl.loggers.CSVLogger(str(tmp_path), name="mine")
    trainer = make_trainer(tmp_path, logger=logger, callbacks=[saver], enable_checkpointing=True)
    assert saver._find_last_checkpoints(trainer) == set()
    places = ["mine/version_0/checkpoints/step=00000009.ckpt",
              "mine/version_1/checkpoints/step=00000002.ckpt",
              "mine/version_1/checkpoints/step=00000004.ckpt.unfinished",
              "other/version_0/checkpoints/step=00000006.ckpt"]  # fmt: skip
    for age, place in enumerate(places):
        file = tmp_path / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        os.utime(file, (1000 + age, 1000 + age))
    assert saver._find_last_checkpoints(trainer) == {str(tmp_path / places[1])}
    os.utime(tmp_path / places[0], (2000, 2000))
    assert saver._find_last_checkpoints(trainer) == {str(tmp_path / places[0])}
    elsewhere = FSDPCheckpoint(str(tmp_path / "mine/version_1/checkpoints"))
    assert elsewhere._find_last_checkpoints(trainer) == {str(tmp_path / places[1])}


# ---- what is in it


def test_only_the_student_is_in_it(tmp_path: Path, folders: Folders) -> None:
    fit(tmp_path, folders, FSDPCheckpoint(), max_steps=2)
    saved = torch.load(tmp_path / "checkpoints/step=00000002.ckpt", weights_only=True)
    assert all(name.startswith("student.model.") for name in saved["state_dict"])
    student = make_module(*folders)
    student.configure_model()
    assert set(saved["state_dict"]) == set(student.state_dict())


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a if k not in CLOCKS)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


CLOCKS = {"seconds", "teacher_seconds", "train_seconds", "path"}


def test_an_asynchronous_checkpoint_holds_the_state_of_its_step(
    tmp_path: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written late, when the weights have long changed."""
    late: list[Any] = []
    for kind in (False, True):
        saver = FSDPCheckpoint(monitor=None, keep_last=9, asynchronous=kind)
        if kind:  # nothing reaches the disk before the next one is due
            own = checkpoints.save_file
            monkeypatch.setattr(checkpoints, "save_file", lambda *a: late.append(a))
        trainer = fit(tmp_path / str(kind), folders, saver, max_steps=6)
    for state, path in late:
        own(state, path)
    for step in (2, 4, 6):
        name = f"checkpoints/step={step:08d}.ckpt"
        a, b = (torch.load(tmp_path / str(k) / name, weights_only=True) for k in (False, True))
        assert equal(a, b) and a["global_step"] == step
    assert not equal(a["state_dict"], torch.load(tmp_path / "True/checkpoints/step=00000004.ckpt")["state_dict"])  # fmt: skip  # noqa: E501
    assert trainer.global_step == 6


# ---- stopped


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_stops_the_run_and_keeps_the_earlier_one(
    tmp_path: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    real = torch.save

    def full(state: Any, target: Any) -> None:
        if state["global_step"] == 6:
            raise OSError(28, "No space left on device")
        real(state, target)

    monkeypatch.setattr(torch, "save", full)
    words = r"a checkpoint must be writable: got OSError: .*No space left on device at step [68]"
    with pytest.raises(TrainingStopped, match=words) as error:
        fit(tmp_path, folders, FSDPCheckpoint(monitor=None, asynchronous=asynchronous))
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    whole = [p for p in (tmp_path / "checkpoints").glob("step=*.ckpt")]
    assert [p.name for p in whole] == ["step=00000004.ckpt"]
    assert read_metadata(str(whole[0]))["global_step"] == 4


@pytest.mark.parametrize("step", [3, 4, 5])  # in a rollout, at a validation, in a next one
@pytest.mark.parametrize("asynchronous", [False, True])
def test_sigterm_stops_behind_the_step_and_saves(
    tmp_path: Path, folders: Folders, step: int, asynchronous: bool
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    saver = FSDPCheckpoint(asynchronous=asynchronous)
    words = (
        rf"stopped by SIGTERM after step {step}: saved .*step={step:08d}\.ckpt\. Continue with `--"
    )
    with pytest.raises(Interrupted, match=words):
        fit(tmp_path, folders, saver, At(step, terminate), max_steps=20)
    file = tmp_path / f"checkpoints/step={step:08d}.ckpt"
    saved = read_metadata(str(file))
    assert saved["global_step"] == step
    assert (saved["callbacks"]["FSDPCheckpoint"]["entries"][-1]["score"] is not None) == (step == 4)
    assert signal.getsignal(signal.SIGTERM) == before
    seen = At(step, terminate)
    fit(tmp_path, folders, FSDPCheckpoint(), seen, ckpt_path=str(file), max_steps=step + 1)


def test_a_signal_within_a_step_waits_for_its_end(tmp_path: Path, folders: Folders) -> None:
    class Within(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                terminate()

    class Early(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                terminate()

    for number, source in enumerate((Within(), Early())):
        with pytest.raises(Interrupted, match="after step 3: "):
            fit(tmp_path / str(number), folders, FSDPCheckpoint(), source,
                accumulate_grad_batches=2)  # fmt: skip
        assert 3 in steps(tmp_path / str(number) / "checkpoints")


def test_a_signal_that_reaches_one_rank_late_waits_for_the_next_agreement(
    tmp_path: Path, folders: Folders
) -> None:
    """Between two agreements of the ranks a signal changes nothing: the others know of none."""

    class AtValidation(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == 4:
                terminate()

    with pytest.raises(Interrupted, match="after step 5: "):
        fit(tmp_path, folders, FSDPCheckpoint(), AtValidation())


def test_an_exception_saves_nothing(tmp_path: Path, folders: Folders) -> None:
    def fail() -> None:
        raise KeyError("someone's callback")

    with pytest.raises(KeyError):
        fit(tmp_path, folders, FSDPCheckpoint(), At(3, fail))
    assert steps(tmp_path / "checkpoints") == [2]


# ---- gone on with


@pytest.mark.parametrize("found", [False, True])
def test_a_named_checkpoint_stays_and_the_last_is_replaced(
    tmp_path: Path, folders: Folders, found: bool
) -> None:
    """Several runs may start from a checkpoint that a user names."""

    def once(max_steps: int, ckpt_path: str | None = None) -> None:
        logger = pl.loggers.CSVLogger(str(tmp_path), name="mine")
        fit(tmp_path, folders, FSDPCheckpoint(monitor=None), logger=logger, max_steps=max_steps,
            ckpt_path=ckpt_path)  # fmt: skip

    once(4)
    first = tmp_path / "mine/version_0/checkpoints/step=00000004.ckpt"
    once(8, "last" if found else str(first))
    assert steps(tmp_path / "mine/version_1/checkpoints") == [8]
    assert first.exists() != found


def test_a_finished_run_that_is_gone_on_with_stays_as_it_is(
    tmp_path: Path, folders: Folders
) -> None:
    first = fit(tmp_path, folders, FSDPCheckpoint(monitor=None))
    file = tmp_path / "checkpoints/step=00000008.ckpt"
    before = file.read_bytes()
    again = fit(tmp_path, folders, FSDPCheckpoint(monitor=None), ckpt_path=str(file))
    assert again.global_step == 8 and file.read_bytes() == before
    ours, theirs = (t.lightning_module.state_dict() for t in (first, again))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_a_killed_save_left_is_cleared_up(tmp_path: Path, folders: Folders) -> None:
    root = tmp_path / "checkpoints"
    (root / "step=00000004.ckpt.unfinished").mkdir(parents=True)
    (root / "step=00000006.ckpt.unfinished").write_bytes(b"half")
    fit(tmp_path, folders, FSDPCheckpoint(monitor=None))
    assert steps(root) == [8]
