"""Writes the completions of ``predict`` into one file."""

from __future__ import annotations

from typing import Literal

import lightning.pytorch as pl
import torch.distributed as dist

from kdrl_lightning.common.distributed import stop_together
from kdrl_lightning.common.untyped import Tree
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.evaluation.files import JSONLFile, ParquetFile, PredictionFile
from kdrl_lightning.trainer.protocols import trained
from kdrl_lightning.trainer.run_folder import run_folder


class PredictionWriter(pl.Callback):
    """Writes ``predictions.jsonl`` or ``.parquet`` into the run folder, batch by batch.

    All processes write one file, with a row per completion, in the order of sets, prompts and
    samples. The file's name ends in ``.part`` until it is complete. The callback keeps no
    completions in memory.

    Args:
        format: ``jsonl`` writes our columns and those of the prompt's row; if one of these has the
            name of one of ours (``completion``, ``reward``, ``index``, ...), it goes into ``row``.
            ``parquet`` writes our columns, and the prompt's row as JSON in ``row``; needs pyarrow.
    """

    def __init__(self, format: Literal["jsonl", "parquet"] = "jsonl") -> None:
        if format not in ("jsonl", "parquet"):
            raise ConfigurationError(
                f"`format` must be jsonl or parquet: got {format}. Choose one of them."
            )
        self.format = format
        self._file: PredictionFile | None = None

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the file on the first rank."""
        name = f"predictions.{self.format}"
        folder = run_folder(trainer, name)  # a collective: all ranks
        kind = JSONLFile if self.format == "jsonl" else ParquetFile

        def opened() -> PredictionFile | None:
            if not trainer.is_global_zero:
                return None
            folder.mkdir(parents=True, exist_ok=True)
            return kind(folder / name)

        self._file = stop_together(opened, trained(pl_module).reduce)

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: list[Tree],
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Gather a batch from all ranks and write it."""
        parts: list[list[Tree] | None] | None = [outputs]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size if trainer.is_global_zero else None
            dist.gather_object(outputs, parts)
        rows = [row for part in parts or [] for row in part or []]
        rows.sort(key=lambda row: (row["index"], row["sample"]))
        stop_together(lambda: self._file and self._file.write(rows), trained(pl_module).reduce)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            print(f"{self._file.rows} completions written to {self._file.path}")
            self._file = None
