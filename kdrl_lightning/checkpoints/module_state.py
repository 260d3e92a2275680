"""What a checkpoint says of a module beside weights and moments, and how a resume reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdrl_lightning.checkpoints.integrity import whole_folder
from kdrl_lightning.checkpoints.reader import check_readable, read_metadata
from kdrl_lightning.checkpoints.resume import (
    KEY,
    check_complete,
    check_identity,
    identity,
    number_by_place,
)
from kdrl_lightning.models.loading import load_config
from kdrl_lightning.trainer.failures import export_together


def check_checkpoint(path: str, module: Any, fitting: bool) -> None:
    """Check a checkpoint against a module before the strategy reads it.

    Args:
        path: of the checkpoint.
        module: the ``KDRLModule`` that is to take it.
        fitting: training goes on, so that the method counts too.

    Raises:
        ConfigurationError: it is damaged, or of another student or method.
    """
    values = read_metadata(path)
    saved, held = values.get(KEY), values.get("state_dict")
    check_readable(path, module.trainer.strategy)
    if saved is not None:
        loaded = module.student and module.weights().model.config  # or its part for text
        config = loaded or load_config(module.student_path)
        check_identity(saved, module, config, fitting, path)
    if module.lora is not None and held is not None:  # shards say so themselves
        check_complete(held.keys(), module.state_dict().keys(), path)


def save_state(checkpoint: dict[str, Any], module: Any, sharded: bool) -> None:
    """Add to a checkpoint whose it is, and what the module counts.

    Args:
        checkpoint: what Lightning is about to write.
        module: the ``KDRLModule``.
        sharded: the strategy numbers the optimizer's parameters itself.
    """
    checkpoint[KEY] = {
        **identity(module),
        **module.nonfinite.state_dict(),
        "teacher_seconds": module.teacher_seconds,
        **module.log_state(),
    }
    if not sharded:
        optimizer = module.optimizers(use_pl_optimizer=False)
        for state in checkpoint.get("optimizer_states", []):
            number_by_place(state, optimizer, module)


def load_state(checkpoint: dict[str, Any], module: Any) -> None:
    """Restore the module's counts."""
    saved = checkpoint.get(KEY)
    if saved is not None:
        module.nonfinite.load_state_dict(saved)
        module.frozen.seconds = saved["teacher_seconds"]
        module.load_log_state(saved)


def export_student(module: Any, trainer: Any | None, path: str) -> None:
    """Write a module's student and tokenizer as a Hugging Face folder; all ranks must call it.

    Args:
        module: the ``KDRLModule``.
        trainer: of the module; None outside of a run.
        path: of the folder. It gets the new student as a whole: if that cannot be written, an
            earlier one stays.

    Raises:
        TrainingStopped: on every rank, if the first one cannot write.
    """
    writes = trainer is None or trainer.is_global_zero
    write = module.weights().writer(writes)

    def write_both() -> None:
        if not writes:
            return
        with whole_folder(Path(path)) as half:
            write(str(half))
            module.tokenizer.save_pretrained(half)

    if trainer is None:
        write_both()
    else:
        export_together(trainer, write_both, path)
