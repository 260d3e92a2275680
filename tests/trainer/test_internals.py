"""The one file that uses Lightning's internals, against the installed Lightning."""

from __future__ import annotations

import ast
import inspect
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.strategies.model_parallel import _load_checkpoint
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loops import _FitLoop, _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from torch.utils.data import DataLoader

from helpers.plain_module import OneWeight
from helpers.short_runs import make_trainer
from kdrl_lightning.trainer import internals
from kdrl_lightning.trainer.strategies import FSDP2Strategy

PACKAGE = Path(__file__).parents[2] / "kdrl_lightning"
LIGHTNING = Path(lightning.__file__).parent
# Lightning's documentation tells callbacks to call it in `state_key`.
DOCUMENTED = {"_generate_state_key"}
# Files that may use private names of Lightning, and the only ones that they may use.
ELSEWHERE = {
    # A LightningModule: `self.trainer` raises without a trainer, and there is no other way to ask.
    "module.py": {"_trainer"},
    # The command line is a LightningCLI and calls or overrides its methods.
    "cli/main.py": set(internals.OVERRIDDEN[pl.cli.LightningCLI]),
    "callbacks/checkpoint.py": {"_find_last_checkpoints"},
}


class Validated(OneWeight):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


class Asks(pl.Callback):
    """Asks at each training batch whether a validation follows, and notes those that do."""

    def __init__(self) -> None:
        self.said: list[bool] = []
        self.done: list[int] = []
        self.state: dict[str, Any] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.said.append(internals.validates_next(trainer))
        self.state = internals.dump_checkpoint(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.done.append(trainer.global_step)


def run(folder: Path, asks: Asks, path: str | None = None, steps: int = 6) -> pl.Trainer:
    loader = DataLoader(torch.arange(6))  # type: ignore[arg-type]
    trainer = make_trainer(folder, callbacks=[asks], max_steps=steps, val_check_interval=3)
    read: list[tuple[str, str | None]] = []
    trainer.read = read  # type: ignore[attr-defined]
    internals.before_restore(trainer, lambda p: read.append(("all", p)))
    internals.before_load(trainer.strategy, lambda p: read.append(("strategy", p)))
    trainer.fit(Validated(), loader, loader, ckpt_path=path)
    return trainer


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
def test_the_run_is_asked_and_checked_at_the_right_moments(tmp_path: Path) -> None:
    asks = Asks()
    trainer = run(tmp_path, asks)
    assert asks.said == [False, False, True] * 2
    assert asks.done == [3, 6]
    assert trainer.read == [("all", None)]  # type: ignore[attr-defined]
    assert asks.state["global_step"] == 6
    assert {"loops", "optimizer_states", "state_dict", "callbacks"} <= set(asks.state)
    path = str(tmp_path / "run.ckpt")
    trainer.save_checkpoint(path)
    read = run(tmp_path, Asks(), path, 7).read  # type: ignore[attr-defined]
    assert read == [("all", path), ("strategy", path)]


def test_early_stopping_looks_after_the_validation() -> None:
    stopping = EarlyStopping("val/accuracy")
    assert stopping._check_on_train_epoch_end is None  # Lightning decides in `setup`
    internals.stop_after_validation(stopping)
    told = EarlyStopping("val/accuracy", check_on_train_epoch_end=False)
    assert stopping._check_on_train_epoch_end is told._check_on_train_epoch_end is False


def test_what_strategies_keep() -> None:
    assert [internals.saves_shards(FSDP2Strategy(parts)) for parts in (True, False)] == [
        True,
        False,
    ]
    assert not internals.saves_shards(SingleDeviceStrategy())
    strategy = ModelParallelStrategy()
    assert strategy._data_parallel_size == "auto"
    internals.set_data_parallel_size(strategy, 3)
    assert strategy._data_parallel_size == 3
    ddp = DDPStrategy(find_unused_parameters=True), DDPStrategy()
    assert [internals.finds_unused_parameters(s) for s in ddp] == [True, False]


def test_a_child_that_fails_is_ours_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ChildProcessObserver, "_terminate_all", internals.KILL_ALL)  # restore it
    calls: list[Any] = []
    monkeypatch.setattr(internals, "KILL_ALL", lambda observer: calls.append("killed"))
    internals.on_child_failure(lambda children, kill_all: (calls.append(children), kill_all())[1])
    child: Any = SimpleNamespace(pid=2**30, poll=lambda: 1, returncode=1)
    _ChildProcessObserver(2**30, [child])._run()
    assert calls == [[child], "killed"]


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (_CheckpointConnector.dump_checkpoint, ["self", "weights_only"]),
        (
            _CheckpointConnector._restore_modules_and_callbacks,
            ["self", "checkpoint_path", "weights_only"],
        ),
        (_TrainingEpochLoop._should_check_val_fx, ["self", "data_fetcher"]),
        (
            _load_checkpoint,
            ["path", "state", "strict", "optimizer_states_from_list", "weights_only"],
        ),
        (_ChildProcessObserver._terminate_all, ["self"]),
    ],
)
def test_private_functions_take_what_they_took(function: Any, arguments: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == arguments


def test_private_attributes_are_still_set() -> None:
    assert "self._data_fetcher" in inspect.getsource(_FitLoop.__init__)
    assert "self._child_processes" in inspect.getsource(_ChildProcessObserver.__init__)
    for owner, names in internals.OVERRIDDEN.items():
        assert all(callable(getattr(owner, name)) for name in names)


def test_the_release_is_the_one_that_was_checked() -> None:
    checked = internals.CHECKED_WITH.split(".")[:2]
    assert lightning.__version__.split(".")[:2] == checked, (
        f"Lightning is {lightning.__version__}: compare its code with trainer/internals.py"
    )


def private_names_of_lightning() -> set[str]:
    """Private attributes, methods, functions and classes in Lightning's sources."""
    text = "\n".join(p.read_text() for p in LIGHTNING.rglob("*.py"))
    return set(re.findall(r"(?:self\.|def |class )(_[a-zA-Z]\w*)", text))


def reaches(path: Path, theirs: set[str]) -> set[str]:
    """Private names of Lightning that a file uses, imports or overrides."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    own = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    attributes = [n for n in nodes if isinstance(n, ast.Attribute)]
    own |= {n.attr for n in attributes if isinstance(n.ctx, ast.Store) and is_self(n.value)}
    found = {n.attr for n in attributes if n.attr in theirs and n.attr not in own}
    found |= {n.attr for n in attributes if n.attr in theirs and not is_self(n.value)} - own
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning":
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found |= {part for part in parts if part.startswith("_")}
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base) for base in node.bases}
            for owner, names in internals.OVERRIDDEN.items():
                if owner.__name__ in bases:
                    methods = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
                    found |= methods & set(names)
    return found - DOCUMENTED


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_no_other_file_reaches_into_lightning() -> None:
    theirs = private_names_of_lightning()
    assert {"_checkpoint_connector", "_ddp_kwargs", "_trainer", "_child_processes"} <= theirs
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE / "callbacks").glob("*.py")]
    files = [p for p in files if "lightning" in p.read_text().replace("kdrl_lightning", "")]
    found = {str(p.relative_to(PACKAGE)): reaches(p, theirs) for p in files}
    assert found.pop("trainer/internals.py")
    extra = {f: names - ELSEWHERE.get(f, set()) for f, names in found.items()}
    assert not {f: names for f, names in extra.items() if names}
    assert {f: found.get(f) for f in ELSEWHERE} == ELSEWHERE


class Fails(pl.Callback):
    """Asks what the main thread does, in a hook that Lightning calls after an error."""

    def __init__(self) -> None:
        self.answers: list[bool] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.answers.append(internals.handles_failure())
        raise ValueError("on purpose")

    def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
        thread = threading.Thread(target=lambda: self.answers.append(internals.handles_failure()))
        thread.start()
        thread.join()


def test_a_thread_can_see_that_an_error_is_being_handled(tmp_path: Path) -> None:
    fails = Fails()
    trainer = make_trainer(tmp_path, callbacks=[fails], max_steps=1)
    with pytest.raises(ValueError, match="on purpose"):
        trainer.fit(OneWeight(), DataLoader(torch.arange(4)))
    assert fails.answers == [False, True] and not internals.handles_failure()
