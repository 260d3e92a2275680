"""Saves the checkpoints of a run, on one device and under DDP and FSDP2."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal, TypedDict

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from kdrl_lightning.callbacks.base import RolloutCallback, updates_per_rollout
from kdrl_lightning.checkpoints.layout import remove_unfinished
from kdrl_lightning.checkpoints.reader import newest_whole
from kdrl_lightning.checkpoints.writer import CheckpointWriter, together
from kdrl_lightning.common.distributed import stop_together
from kdrl_lightning.common.untyped import State
from kdrl_lightning.errors import ConfigurationError, Interrupted, require_count
from kdrl_lightning.trainer.end_of_run import check_space, checkpoint_bytes, student_bytes
from kdrl_lightning.trainer.internals import validates_next
from kdrl_lightning.trainer.protocols import callbacks_of, is_trial_run, trained
from kdrl_lightning.trainer.run_folder import checkpoint_folders, hold, is_alive, run_folder
from kdrl_lightning.trainer.stop_signals import NAMES, StopSignals


class Entry(TypedDict):
    """One checkpoint: its optimizer step, its path, and its validation's score, if it has one."""

    step: int
    path: str
    score: float | None


class FSDPCheckpoint(RolloutCallback, ModelCheckpoint):
    """Saves the student, the optimizer and the run's progress, so that you can resume a killed run.

    A checkpoint is a file ``step=N.ckpt``, or under ``fsdp2`` a folder of shards. It gets its name
    only when it is complete. It holds a half-used rollout, but not the frozen models.

    A resumed run gets a new run folder, and so a new folder of checkpoints.

    The callback saves at the end of every ``every_n_rollouts``-th rollout, and at ``max_steps``; if
    a validation follows, it saves after that. It keeps the newest ``keep_last`` checkpoints, and
    the ``save_top_k`` best of those with a validation. On SIGTERM, SIGHUP or Ctrl-C all processes
    finish the optimizer step, save, and stop; a second Ctrl-C stops at once. After that, and after
    an exception, you can resume from the last checkpoint. ``fit --ckpt_path last`` continues from
    the newest intact checkpoint under the logger's name, whatever its version; in Python,
    ``ckpt_path="best"`` names the best one of the run that has just ended.

    The class extends ``ModelCheckpoint``, so that Lightning knows the last and the best checkpoint.
    It replaces the hooks and file names of ``ModelCheckpoint``, which saves before a validation: a
    run that resumes there would skip the validation.

    Args:
        dirpath: folder of the checkpoints; None: ``checkpoints`` in the run folder.
        monitor: metric of the validation that ranks checkpoints; None keeps only the newest.
        mode: ``max`` or ``min``: whether large or small values are best.
        save_top_k: number of best checkpoints to keep.
        keep_last: number of newest checkpoints to keep.
        every_n_rollouts: number of rollouts (without rollouts: optimizer steps) from one checkpoint
            to the next.
        asynchronous: write while training continues; needs host memory for a copy of the state.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        monitor: str | None = "val/accuracy",
        mode: Literal["max", "min"] = "max",
        save_top_k: int = 1,
        keep_last: int = 1,
        every_n_rollouts: int = 1,
        asynchronous: bool = False,
    ) -> None:
        require_count("save_top_k", save_top_k, 0, float("inf"))
        require_count("keep_last", keep_last, 1, float("inf"))
        require_count("every_n_rollouts", every_n_rollouts, 1, float("inf"))
        if mode not in ("max", "min"):
            raise ConfigurationError(f"`mode` must be max or min: got {mode}. Choose one of them.")
        super().__init__(dirpath, monitor=monitor, mode=mode, save_top_k=save_top_k or 1)
        self._named = self.dirpath
        self.save_top_k = save_top_k
        self.keep_last = keep_last
        self.every_n_rollouts = every_n_rollouts
        self.entries: list[Entry] = []
        self._writer = CheckpointWriter(asynchronous)
        self._folder = Path()
        self._due = self._continues = False
        self._signals, self._stops = StopSignals(self._last_words), 0
        self._held: int | None = None

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint."""
        return type(self).__name__

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier run."""
        self.entries = []
        self._due, self._stops = False, 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose the folder, and check that the disk has room."""
        module = trained(pl_module)
        named, folder = self._named, run_folder(trainer)
        self._folder = folder / "checkpoints" if named is None else Path(named)
        self.dirpath = str(self._folder)
        if is_trial_run(trainer):
            return
        self._held = hold(folder) if trainer.is_global_zero else None
        if named is not None and not trainer.strategy.restore_checkpoint_after_setup:
            self._refuse_another_run(trainer)
        needs = {self._folder: checkpoint_bytes(module)}
        if any(getattr(callback, "export", False) for callback in callbacks_of(trainer)):
            needs[folder] = student_bytes(module)
        stop_together(lambda: check_space(needs) if trainer.is_global_zero else None, module.reduce)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print where a run resumes, delete unfinished checkpoints, and listen for signals."""
        sharded = trainer.strategy.restore_checkpoint_after_setup
        if self._named is not None and sharded and not is_trial_run(trainer):
            self._refuse_another_run(trainer)  # `ckpt_path` was not known before
        if trainer.ckpt_path and trainer.is_global_zero:
            print(f"continuing from {trainer.ckpt_path} at step {trainer.global_step}", flush=True)
        if trainer.is_global_zero:
            remove_unfinished(self._folder)
        if not is_trial_run(trainer):
            self._signals.listen(trainer.is_global_zero)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if a checkpoint is due or a signal came, unless a validation comes first."""
        module = trained(pl_module)
        if is_trial_run(trainer):
            return
        self._stops = self._signals.agreed(module.reduce)
        at_end = trainer.global_step == trainer.max_steps
        every = self.every_n_rollouts * updates_per_rollout(trainer)
        self._due = at_end or trainer.global_step % every == 0
        if not validates_next(trainer):
            if self._due or self._stops:
                module.write_step()  # a killed or stopped run would lose this row for good
            self._save_if_due(trainer, None)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save with the validation's score."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        score = None
        if self.monitor is not None:
            if self.monitor not in trainer.callback_metrics:
                raise ConfigurationError(
                    f"`monitor` must be a metric of the validation: got {self.monitor}. "
                    f"Known: {', '.join(sorted(trainer.callback_metrics))}."
                )
            score = float(trainer.callback_metrics[self.monitor])
        self._save_if_due(trainer, score)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do nothing: checkpoints follow rollouts, not epochs."""

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Stop listening for signals; save nothing, since other ranks may not have failed."""
        self._signals.explain(exception)
        self._let_go()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the last checkpoint; stop if a signal came after the last step."""
        self._writer.wait(trainer)
        self._prune(trainer)
        self._stops = self._signals.agreed(trained(pl_module).reduce)
        self._signals.give_back()
        self._stop_if_agreed(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the signal handlers, and release the run folder."""
        self._let_go()

    def _let_go(self) -> None:
        self._signals.give_back()
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def state_dict(self) -> State:
        """Return the list of checkpoints, with their scores."""
        return {"entries": [entry.copy() for entry in self.entries]}

    def load_state_dict(self, state_dict: State) -> None:
        """Restore the list of checkpoints."""
        self.entries = [entry.copy() for entry in state_dict["entries"]]
        self._name_best()

    def _last_words(self) -> str:
        found = [e["path"] for e in self.entries if Path(e["path"]).exists()]
        return f"the last checkpoint is {found[-1]}." if found else "nothing was saved."

    def _save_if_due(self, trainer: pl.Trainer, score: float | None) -> None:
        if self._due or self._stops:
            self._due = False
            self._save(trainer, score)
        self._stop_if_agreed(trainer)

    def _stop_if_agreed(self, trainer: pl.Trainer) -> None:
        if self._stops:
            self._writer.wait(trainer)
            raise Interrupted(
                f"stopped by {NAMES[self._stops]} after step {trainer.global_step}: saved "
                f"{self.last_model_path}. Continue with `--ckpt_path last`.",
                self._stops,
            )

    def _save(self, trainer: pl.Trainer, score: float | None) -> None:
        step = trainer.global_step
        path = self._folder / f"step={step:08d}.ckpt"
        self._writer.wait(trainer)
        if self._writer.asynchronous:
            self._prune(trainer)
        self.entries = [e for e in self.entries if e["step"] != step]
        self.entries.append({"step": step, "path": str(path), "score": score})
        self._name_best()
        self._writer.write(trainer, path)
        if not self._writer.asynchronous:
            self._prune(trainer)

    def _ranked(self) -> list[Entry]:
        sign = 1.0 if self.mode == "max" else -1.0
        scored = [(e["score"], e) for e in self.entries if e["score"] is not None]
        scored.sort(key=lambda pair: (sign * pair[0], pair[1]["step"]), reverse=True)
        return [entry for _, entry in scored]

    def _name_best(self) -> None:
        ranked = self._ranked()
        self.best_model_path = ranked[0]["path"] if ranked else ""
        self.best_model_score = torch.tensor(ranked[0]["score"]) if ranked else None
        self.last_model_path = self.entries[-1]["path"] if self.entries else ""

    def _prune(self, trainer: pl.Trainer) -> None:
        """Delete checkpoints that are neither among the best nor among the newest.

        We delete those of an earlier run only if ``--ckpt_path last`` found them and that run has
        ended: several runs may start from a path that a user names.
        """
        keep = [*self.entries[-self.keep_last :], *self._ranked()[: self.save_top_k]]
        gone = [e for e in self.entries if e not in keep]
        places = {Path(e["path"]).parent for e in gone} - {self._folder}
        kept = {p for p in places if not self._continues or is_alive(p.parent)}
        gone = [e for e in gone if Path(e["path"]).parent not in kept]
        self.entries = [e for e in self.entries if e in keep]

        def delete() -> None:
            for entry in gone if trainer.is_global_zero else []:
                path = Path(entry["path"])
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

        together(trainer, delete)

    def _refuse_another_run(self, trainer: pl.Trainer) -> None:
        """Refuse another run's folder: each would overwrite the checkpoints of the other."""
        found = next(self._folder.glob("step=*.ckpt"), None) if trainer.is_global_zero else None
        found = trainer.strategy.broadcast(found)
        start = trainer.ckpt_path and Path(trainer.ckpt_path).resolve().parent
        if found is not None and start != self._folder.resolve():
            raise ConfigurationError(
                f"`dirpath` must be a folder without another run's checkpoints: got {self._folder} "
                f"with {found.name}. Name another one, or continue it with `--ckpt_path last`."
            )

    def _find_last_checkpoints(self, trainer: pl.Trainer) -> set[str]:
        """Return the newest intact checkpoint, for ``ckpt_path="last"``.

        We look in ``dirpath``, or in the run folders under the logger's name. If none is intact, we
        return the newest one.
        """
        named = self._named
        folders = checkpoint_folders(trainer) if named is None else [Path(named)]
        found = [p for f in folders for p in f.glob("step=*.ckpt")]  # unfinished ones do not match
        newest, broken = newest_whole(found)
        self._continues = True
        if newest is None:  # reading a damaged one raises an error
            return {str(max(found, key=lambda p: p.stat().st_mtime_ns))} if found else set()
        for text in broken:
            rank_zero_warn(f"`--ckpt_path last` skips {text} and takes {newest}.")
        return {str(newest)}
