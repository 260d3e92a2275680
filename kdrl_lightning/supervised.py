"""A data module for supervised fine-tuning on given completions."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from kdrl_lightning.errors import ConfigurationError, require_between
from kdrl_lightning.prompts.base import Prompts, encode_prompt
from kdrl_lightning.rollout.loader import IndexLoader, prompt_stream
from kdrl_lightning.rollout.partition import partition
from kdrl_lightning.rollout.plan import step_totals
from kdrl_lightning.rollout_batch import RolloutBatch, collate


class SupervisedDataModule(pl.LightningDataModule):
    """Yields batches of given completions, each closed by an end token.

    For a prompt of messages that is the token by which the chat template closes a turn, if it is an
    end token of the model; else the tokenizer's ``eos_token``.

    Args:
        traces: rows with ``prompt`` and ``completion``.
        batch_size: completions per optimizer step, over all processes.
        seed: order of the rows.
    """

    def __init__(self, traces: Prompts, batch_size: int = 128, seed: int = 0) -> None:
        super().__init__()
        require_between("batch_size", batch_size, 1, float("inf"))
        self.traces = traces
        self.batch_size = batch_size
        self.seed = seed
        self._step: tuple[int, list[RolloutBatch]] = (-1, [])

    def setup(self, stage: str) -> None:
        """Switch validation off: there are no prompts to sample from."""
        if getattr(self._trainer().lightning_module.objective, "only_correct", False):
            raise ConfigurationError(
                "`only_correct` must be false for SupervisedDataModule, without verdicts: "
                "got true. Leave the wrong rows out of `traces`."
            )
        trainer = self._trainer()
        ranks, micro = trainer.world_size, trainer.accumulate_grad_batches
        if self.batch_size % ranks or self.batch_size < ranks * micro:
            raise ConfigurationError(
                f"`batch_size` must be a multiple of the {ranks} processes, with at least {micro} "
                f"rows (`accumulate_grad_batches`) for each: got {self.batch_size}."
            )
        trainer.limit_val_batches = 0

    def train_dataloader(self) -> IndexLoader:
        """Return indices of micro-batches within their optimizer step."""
        micro = self._trainer().accumulate_grad_batches
        return IndexLoader(max(len(self.traces) // self.batch_size, 1) * micro, micro)

    def val_dataloader(self) -> list[Any]:
        """Return nothing."""
        return []

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> RolloutBatch:
        """Turn an index into a micro-batch."""
        step = self._trainer().global_step
        if self._step[0] != step:
            self._step = (step, self._make_step(step))
        return self._step[1][int(batch)]

    def _make_step(self, step: int) -> list[RolloutBatch]:
        trainer = self._trainer()
        module, tokenizer = trainer.lightning_module, trainer.lightning_module.tokenizer
        stream = prompt_stream(step * self.batch_size, self.batch_size, len(self.traces), self.seed)
        rows = [self.traces[i] for i in stream[trainer.global_rank :: trainer.world_size]]
        completions = [
            [
                *tokenizer(r["completion"], add_special_tokens=False)["input_ids"],
                module.end_tokens.closing(r["prompt"]),
            ]
            for r in rows
        ]
        whole = collate(
            [encode_prompt(tokenizer, r) for r in rows],
            completions,
            list(range(len(rows))),
            pad_id=tokenizer.eos_token_id,
        ).to(module.device)
        longest = module.reduce(torch.tensor(float(max(map(len, completions)))), "max")
        totals = step_totals(whole, int(longest), module.reduce)
        parts = partition(whole.lengths.tolist(), trainer.accumulate_grad_batches)
        return [whole.select(part).replace(totals=totals) for part in parts]

    def _trainer(self) -> Any:
        assert self.trainer is not None
        return self.trainer
