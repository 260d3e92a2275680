"""A data module for supervised fine-tuning (SFT) on given completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import lightning.pytorch as pl
import torch

from kdrl_lightning.common.distributed import stop_together
from kdrl_lightning.common.untyped import HFTokenizer, Row
from kdrl_lightning.errors import BadRow, ConfigurationError, require_count
from kdrl_lightning.models.end_tokens import EndTokens, space_before_answer
from kdrl_lightning.objectives.sft import SFT
from kdrl_lightning.prompts.base import Prompts
from kdrl_lightning.prompts.encoding import encode_inside
from kdrl_lightning.prompts.prompt_set import PromptRules, PromptSet, check_ids
from kdrl_lightning.prompts.turns import check_characters
from kdrl_lightning.rollout.draws import MOST_TRIES, DrawCounts, draw
from kdrl_lightning.rollout.loader import IndexLoader, limited, rows_at
from kdrl_lightning.rollout.policy import Policy
from kdrl_lightning.rollout.updates import step_totals
from kdrl_lightning.rollout.updates.partition import partition
from kdrl_lightning.rollout_batch import RolloutBatch, collate
from kdrl_lightning.trainer.checks.limits import check_train_batches, overfit_batches
from kdrl_lightning.trainer.strategies import end_children

# `Any`: a sequence's index, which is a number or a slice, and Lightning's batches.

Trace: TypeAlias = tuple[list[int], list[int]]


class Traces(Sequence[Trace]):
    """Token ids of prompts and completions, encoded when they are drawn.

    Each completion is closed by an end token.

    Args:
        source: rows with ``prompt`` and ``completion``.
        module: the training module; its tokenizer encodes, and its vocabulary and context limit
            the ids.
        seed: seed of the sample that is checked.

    Raises:
        ConfigurationError: a checked row cannot be used.
    """

    def __init__(self, source: Prompts, module: Policy, seed: int) -> None:
        self.tokenizer, self.vocabularies = module.tokenizer, {"student": module.vocabulary_rows}
        self.context, self.ends = module.context_length, module.end_tokens
        if module.teacher is not None and module.teacher.vocabulary_rows is not None:
            self.vocabularies["teacher"] = module.teacher.vocabulary_rows
        rules = PromptRules(vocabularies=self.vocabularies)
        self.prompts = PromptSet(source, "traces", self.tokenizer, rules, seed=seed)
        for number, (row, ids) in self.prompts.checked_rows():
            self._completed(row, ids, number)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Any) -> Any:
        """Return one (prompt ids, completion ids) pair.

        Raises:
            BadRow: the row cannot be used.
        """
        row, ids = self.prompts[index]
        return ids, self._completed(row, ids, index)

    def _completed(self, row: Row, prompt: list[int], number: int) -> list[int]:
        try:
            ids = encode_completion(self.tokenizer, row, self.ends)
            for model, rows in self.vocabularies.items():
                check_ids(ids, rows, model, self.tokenizer)
            if len(prompt) + len(ids) > self.context:
                raise ConfigurationError(
                    f"prompt and completion must have at most {self.context} tokens, the student's "
                    f"context: got {len(prompt) + len(ids)}. Remove the row."
                )
        except ConfigurationError as error:
            raise BadRow(f"row {number} of `traces`: {error}") from error
        return ids


def encode_completion(tokenizer: HFTokenizer, row: Row, ends: EndTokens) -> list[int]:
    """Return the token ids of a row's completion, closed by one end token.

    Args:
        tokenizer: the student's tokenizer.
        row: a row with ``completion``, and ``prompt``, which decides the end token.
        ends: the model's end tokens.

    Raises:
        ConfigurationError: ``completion`` is not a text that the tokenizer knows.
    """
    text = row.get("completion")
    if not isinstance(text, str):
        raise ConfigurationError(
            f"the column `completion` must be text: got {text!r:.80}. Remove the row, or rename "
            "the column."
        )
    check_characters(tokenizer, text, "completion")
    chat = not isinstance(row.get("prompt", ""), str)
    if chat and not text[:1].isspace():
        text = space_before_answer(tokenizer) + text
    ids = encode_inside(tokenizer, text)
    for place in reversed(range(len(ids))):
        if ids[place] in ends.ids:  # the text has it, or the tokenizer adds it
            ids = ids[:place]
        elif tokenizer.decode(ids[place]).strip():  # a template writes a line break after its end
            break
    return [*ids, ends.closing(row.get("prompt"))]


class SupervisedDataModule(pl.LightningDataModule):
    """Yields given completions for supervised fine-tuning, each closed by an end token.

    For a prompt of messages, the end token is the one with which the chat template closes a turn,
    if it is an end token of the model; otherwise it is the tokenizer's ``eos_token``.

    Args:
        traces: rows with ``prompt`` and ``completion``.
        batch_size: completions per optimizer step, over all processes.
        seed: seed of the rows' order.
    """

    def __init__(self, traces: Prompts, batch_size: int = 128, seed: int = 0) -> None:
        super().__init__()
        require_count("batch_size", batch_size, 1, float("inf"))
        self.traces = traces
        self.batch_size = batch_size
        self.seed = seed
        self._step: tuple[int, list[RolloutBatch]] = (-1, [])
        self._traces: Traces | None = None
        self._counts = DrawCounts()
        self._repeat = 0  # steps after which the rows repeat (`overfit_batches`); 0: after all rows

    def setup(self, stage: str) -> None:
        """Check the settings and a sample of the traces; switch validation off.

        Raises:
            ConfigurationError: the objective needs verdicts, ``batch_size`` or ``overfit_batches``
                does not fit the trainer, or a checked row cannot be used.
        """
        trainer, module = self._trainer(), self._policy()
        if isinstance(module.objective, SFT) and module.objective.only_correct:
            raise ConfigurationError(
                "`only_correct` must be false for SupervisedDataModule, which has no verdicts: "
                "got true. Remove wrong completions from `traces` instead."
            )
        ranks, micro = trainer.world_size, trainer.accumulate_grad_batches
        if self.batch_size % ranks or self.batch_size < ranks * micro:
            raise ConfigurationError(
                f"`batch_size` must be a multiple of the {ranks} processes, with at least {micro} "
                f"rows (`accumulate_grad_batches`) for each: got {self.batch_size}. Give a "
                f"multiple of {ranks} from {ranks * micro} on."
            )
        trainer.limit_val_batches = 0
        self._traces = Traces(self.traces, module, self.seed)
        self._counts = DrawCounts()
        length = max(len(self.traces) // self.batch_size, 1) * micro
        overfit = overfit_batches(trainer)
        batches = limited(length, overfit)
        if overfit and (batches % micro or not batches):
            raise ConfigurationError(
                f"`overfit_batches` must be whole optimizer steps of {micro} micro-batches: got "
                f"{overfit}, which is {batches} of {length}. Give a multiple of "
                f"{micro}."
            )
        check_train_batches(trainer, length)
        self._repeat = batches // micro

    def on_exception(self, exception: BaseException) -> None:
        """End the processes that would wait for this one, after callbacks saved the student."""
        assert self.trainer is not None
        end_children(self.trainer.strategy, exception)

    def train_dataloader(self) -> IndexLoader:
        """Return a loader of micro-batch indices within the optimizer step."""
        micro = self._trainer().accumulate_grad_batches
        return IndexLoader(max(len(self.traces) // self.batch_size, 1) * micro, micro)

    def val_dataloader(self) -> list[Any]:
        """Return no loaders: there are no prompts to sample from."""
        return []

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> RolloutBatch:
        """Return the micro-batch of an index, on the module's device."""
        step = self._trainer().global_step
        if self._step[0] != step:
            self._step = (step, self._make_step(step))
        return self._step[1][int(batch)]

    def _make_step(self, step: int) -> list[RolloutBatch]:
        trainer, module = self._trainer(), self._policy()
        drawn = stop_together(lambda: self._draw(step), module.reduce)
        counts = torch.tensor(self._counts.take(), dtype=torch.float64)
        read, _, bad = module.reduce(counts, "sum").tolist()
        self._counts.judge(read, bad)
        whole = collate(
            [prompt for prompt, _ in drawn],
            [completion for _, completion in drawn],
            list(range(len(drawn))),
            pad_id=module.tokenizer.eos_token_id,
        ).to(module.device)
        longest = module.reduce(torch.tensor(float(max(len(c) for _, c in drawn))), "max")
        totals = step_totals(whole, int(longest), module.reduce)
        parts = partition(whole.lengths.tolist(), trainer.accumulate_grad_batches)
        return [whole.select(part).replace(totals=totals) for part in parts]

    def _draw(self, step: int) -> list[Trace]:
        """Return this rank's traces of a step; a later step's row replaces an unusable one."""
        trainer, traces = self._trainer(), self._traces
        assert traces is not None
        first = step % self._repeat if self._repeat else step
        drawn = []
        for place in range(trainer.global_rank, self.batch_size, trainer.world_size):
            positions = ((first + k) * self.batch_size + place for k in range(MOST_TRIES))
            rows = (rows_at([p], len(traces), self.seed)[0] for p in positions)
            trace, bad = draw(traces, rows)
            self._counts.add(1, bad)
            drawn.append(trace)
        return drawn

    def _trainer(self) -> pl.Trainer:
        assert self.trainer is not None
        return self.trainer

    def _policy(self) -> Policy:
        # Lightning types the module as any LightningModule.
        return cast(Policy, self._trainer().lightning_module)
