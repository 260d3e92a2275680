"""Every run writes to a separate folder, whatever the logger, and ``last`` finds the newest."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from helpers.short_runs import make_data, make_module, make_trainer
from kdrl_lightning import GRPO
from kdrl_lightning.__main__ import main
from kdrl_lightning.callbacks import FSDPCheckpoint, RunReport
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.trainer.run_folder import checkpoint_folders, hold, is_alive, run_folder

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*of the (completions|groups):UserWarning",
        "ignore:The number of training batches:UserWarning",
        "ignore:Experiment logs directory:UserWarning",
        "ignore:.*there is no last checkpoint available:UserWarning",
    ),
]


class ServiceLogger(Logger):
    """Names its run as W&B does: by a project and an id, which the service gives at the start."""

    ids = iter(f"id{n}" for n in range(100))

    def __init__(
        self, save_dir: str | None = ".", project: str | None = "proj", version: str | None = None
    ) -> None:
        super().__init__()
        self._save_dir, self._project, self._id = save_dir, project, version

    @property
    def experiment(self) -> None:
        self._id = self._id or next(self.ids)

    @property
    def save_dir(self) -> str | None:
        return self._save_dir

    @property
    def name(self) -> str | None:
        return self._project

    @property
    def version(self) -> str | None:
        return self._id

    def log_metrics(self, *_: Any, **__: Any) -> None: ...

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


class ServiceLoggerOfMine(ServiceLogger):
    """Takes the settings of its base as they come."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class Nameless(ServiceLogger):
    """Says nothing of its run."""

    experiment = None  # type: ignore[assignment]

    def __init__(self, save_dir: str | None) -> None:
        super().__init__(save_dir, None)


def fit(
    root: Path, student: str, logger: Any, max_steps: int = 2, ckpt_path: str | None = None
) -> FSDPCheckpoint:
    saver = FSDPCheckpoint(monitor=None)
    trainer = make_trainer(
        root,
        logger=logger,
        max_steps=max_steps,
        callbacks=[RunReport(evaluate_teacher=False), saver],
        enable_checkpointing=True,
    )
    module = make_module(student, None, GRPO())
    trainer.fit(module, datamodule=make_data(val_prompts=None), ckpt_path=ckpt_path)
    folder = Path(saver.last_model_path).parents[1]
    assert run_folder(trainer) == folder
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["export_path"] == str(folder / "student")
    return saver


LOGGERS: dict[str, Any] = {
    "none": lambda root: False,
    "csv": lambda root: CSVLogger(root, name="mine"),
    "csv with a fixed version": lambda root: CSVLogger(root, name="mine", version=7),
    "tensorboard without a name": lambda root: TensorBoardLogger(root, name="", version=""),
    "tensorboard with a subfolder": lambda root: TensorBoardLogger(root, sub_dir="sub"),
    "service": lambda root: ServiceLogger(str(root)),
    "service, the same id": lambda root: ServiceLogger(str(root), version="same"),
    "service without a folder": lambda root: ServiceLogger(None),
    "nameless": lambda root: Nameless(str(root)),
    "several": lambda root: [ServiceLogger(str(root)), CSVLogger(root, name="mine")],
}


@pytest.mark.parametrize("kind", LOGGERS)
def test_runs_share_no_folder_and_last_finds_the_newest(
    tmp_path: Path, student_folder: str, kind: str
) -> None:
    make = LOGGERS[kind]
    first = fit(tmp_path, student_folder, make(tmp_path), max_steps=4)
    one = Path(first.last_model_path)
    student = one.parents[1] / "student/model.safetensors"
    before = {file: file.read_bytes() for file in (one, student)}
    second = fit(tmp_path, student_folder, make(tmp_path))
    two = Path(second.last_model_path)
    assert two.parents[1] != one.parents[1]
    assert {file: file.read_bytes() for file in (one, student)} == before
    third = fit(tmp_path, student_folder, make(tmp_path), max_steps=4, ckpt_path="last")
    assert [e["step"] for e in third.entries] == [4]  # from step 2: it replaced that of the second
    assert not two.exists() and one.read_bytes() == before[one]
    assert len(list(tmp_path.rglob("student/model.safetensors"))) == 3
    assert len(list(tmp_path.rglob("summary.json"))) == 3


def test_a_run_id_finds_its_own_last_checkpoint(tmp_path: Path, student_folder: str) -> None:
    mine = fit(tmp_path, student_folder, ServiceLogger(str(tmp_path), version="mine"))
    fit(tmp_path, student_folder, ServiceLogger(str(tmp_path), version="other"))
    trainer = make_trainer(tmp_path, logger=ServiceLogger(str(tmp_path), version="mine"))
    assert FSDPCheckpoint()._find_last_checkpoints(trainer) == {mine.last_model_path}


def test_the_checkpoint_of_a_run_that_is_alive_stays(tmp_path: Path, student_folder: str) -> None:
    """`last` finds it all the same, but both runs go on from it."""
    one = Path(fit(tmp_path, student_folder, CSVLogger(tmp_path, name="mine")).last_model_path)
    assert not is_alive(one.parents[1]) and not is_alive(tmp_path)
    held = hold(one.parents[1])  # as another process does
    assert held is not None and is_alive(one.parents[1]) and hold(one.parents[1]) is None
    for alive in (True, False):
        other = CSVLogger(tmp_path, name="mine")
        newest = Path(fit(tmp_path, student_folder, other, 4, "last").last_model_path)
        assert one.exists() == alive and newest.exists()
        if alive:
            shutil.rmtree(newest.parent)
            os.close(held)


def test_folders_are_named_after_the_run(tmp_path: Path) -> None:
    def folders(logger: Any) -> list[str]:
        found = []
        for _ in range(3):
            trainer = make_trainer(tmp_path / "root", logger=logger)
            found.append(str(run_folder(trainer).relative_to(tmp_path)))
            assert run_folder(trainer) == tmp_path / found[-1]  # and stays so
        return found

    assert folders(False) == ["root", "root/version_1", "root/version_2"]
    service = ServiceLogger(str(tmp_path), "a/b", "x")
    assert folders(service) == ["a/b/x", "a/b/x-1", "a/b/x-2"]
    assert folders(Nameless(str(tmp_path / "n"))) == ["n/version_0", "n/version_1", "n/version_2"]
    number = CSVLogger(tmp_path, name="c", version=3)
    assert folders(number) == ["c/version_3", "c/version_3-1", "c/version_3-2"]


def test_a_folder_from_before_is_left_alone(tmp_path: Path) -> None:
    """Also the user's own: a model called `student` must not be overwritten by the export."""
    names = ("checkpoints/step=00000002.ckpt", "student", "config.yaml")
    for number, name in enumerate(names):
        root = tmp_path / str(number)
        (root / name).mkdir(parents=True)
        assert run_folder(make_trainer(root, logger=False)) == root / "version_1"


def test_a_trial_run_reserves_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "root", logger=False, fast_dev_run=True)
    assert run_folder(trainer) == tmp_path / "root"
    assert not (tmp_path / "root").exists()


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trainer = make_trainer(tmp_path / "file", logger=False)
    with pytest.raises(
        ConfigurationError, match=r"run folder must be writable: got .*file \(.*Exi"
    ):
        run_folder(trainer)


def test_a_named_folder_holds_one_run(tmp_path: Path, student_folder: str) -> None:
    def once(max_steps: int, ckpt_path: str | None = None) -> None:
        saver = FSDPCheckpoint(str(tmp_path / "kept"), monitor=None)
        trainer = make_trainer(
            tmp_path, callbacks=[saver], enable_checkpointing=True, max_steps=max_steps
        )
        module, data = make_module(student_folder, None, GRPO()), make_data(val_prompts=None)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)

    once(2)
    file = tmp_path / "kept/step=00000002.ckpt"
    before = file.read_bytes()
    words = r"`dirpath` must be a folder without another run's.*step=00000002\.ckpt.*path last`"
    with pytest.raises(ConfigurationError, match=words):
        once(4)
    assert file.read_bytes() == before
    once(4, "last")
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["step=00000004.ckpt"]


# ---- on the command line


@pytest.fixture
def start(tmp_path: Path, student_folder: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    prompts = {"class_path": "kdrl_lightning.tiny.ColumnAddition", "init_args": {"size": 8}}
    config = {
        "model": {"student": student_folder, "objective": {"class_path": "GRPO"}},
        "data": {
            "train_prompts": prompts,
            "reward": "kdrl_lightning.tiny.addition_reward",
            "rollout": {
                "prompts_per_rollout": 2,
                "group_size": 2,
                "max_tokens": 4,
            },
        },
        "trainer": {"max_steps": 1, "accelerator": "cpu"},
    }
    Path("run.yaml").write_text(yaml.safe_dump(config))

    def run(command: str, *flags: str, **trainer: Any) -> set[str]:
        changed = {**config, "trainer": {**config["trainer"], **trainer}}  # type: ignore[dict-item]
        Path("run.yaml").write_text(yaml.safe_dump(changed))
        before = set(tmp_path.rglob("*"))
        main([command, "--config", "run.yaml", *flags])
        new = set(tmp_path.rglob("*")) - before
        return {str(p.relative_to(tmp_path)) for p in new if p.is_file()}

    return run


FILES = {"config.yaml", "summary.json", "checkpoints/step=00000001.ckpt", "student/config.json"}
NAMED = {"class_path": "CSVLogger", "init_args": {"name": "grpo"}}


@pytest.mark.parametrize(
    ("trainer", "flags", "folder"),
    [
        ({}, (), "runs/kdrl_lightning/version_0"),
        ({}, ("--trainer.default_root_dir=out",), "out/kdrl_lightning/version_0"),
        ({"logger": NAMED}, ("--trainer.default_root_dir=out",), "out/grpo/version_0"),
        ({"logger": NAMED}, (), "runs/grpo/version_0"),
        ({}, ("--trainer.default_root_dir=out", "--trainer.logger.save_dir=logs"),
         "logs/kdrl_lightning/version_0"),
        ({"logger": {**NAMED, "init_args": {"save_dir": "logs"}}, "default_root_dir": "out"}, (),
         "logs/kdrl_lightning/version_0"),
        ({"logger": False}, ("--trainer.default_root_dir=out",), "out"),
        ({"logger": True}, ("--trainer.default_root_dir=out",), "out/lightning_logs/version_0"),
        ({"logger": {"class_path": "test_run_folder.ServiceLogger",
                     "init_args": {"version": "x"}}},
         ("--trainer.default_root_dir=out",), "out/proj/x"),
        ({"logger": {"class_path": "test_run_folder.ServiceLoggerOfMine",
                     "init_args": {"version": "x"}}},
         ("--trainer.default_root_dir=out",), "out/proj/x"),
        ({"logger": {"class_path": "test_run_folder.ServiceLogger",
                     "init_args": {"version": "x", "save_dir": "logs"}}},
         ("--trainer.default_root_dir=out",), "logs/proj/x"),
        ({"logger": [{"class_path": "test_run_folder.ServiceLogger",
                      "init_args": {"version": "x"}}, {**NAMED, "init_args": {"save_dir": ""}}]},
         ("--trainer.default_root_dir=out",), "out/proj/x"),
    ],
)  # fmt: skip
def test_the_root_takes_effect_unless_the_logger_names_a_folder(
    start: Any, trainer: dict[str, Any], flags: tuple[str, ...], folder: str
) -> None:
    files = start("fit", *flags, **trainer)
    assert {f"{folder}/{name}" for name in FILES} <= files
    assert {Path(name).parts[0] for name in files} == {Path(folder).parts[0]}


def test_predictions_of_two_runs_share_no_folder(start: Any) -> None:
    flags = ("--trainer.logger=false", "--data.test_prompts=kdrl_lightning.tiny.ColumnAddition")
    for folder in ("runs", "runs/version_1"):
        files = start("predict", *flags, "--data.test_prompts.size=2")
        assert files == {f"{folder}/predictions.jsonl"}
    assert checkpoint_folders(pl.Trainer(logger=False, default_root_dir="runs")) == [
        Path("runs/checkpoints"), Path("runs/version_1/checkpoints")]  # fmt: skip
