"""Encodes the evaluation sets of a stage, and samples their batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from kdrl_lightning.engines.base import Sampling, noise_seed
from kdrl_lightning.errors import BadRow, ConfigurationError
from kdrl_lightning.evaluation.batch import EvaluationBatch
from kdrl_lightning.evaluation.sets import EvalSets, EvaluationSettings, NamedSet, named_sets
from kdrl_lightning.prompts.base import EncodedPrompt, Prompts
from kdrl_lightning.prompts.prompt_set import PromptSet
from kdrl_lightning.rewards.base import Reward
from kdrl_lightning.rollout.generation import Judged
from kdrl_lightning.rollout.loader import IndexLoader
from kdrl_lightning.rollout.prompt_order import EVALUATION_NOISE


class SampleAndJudge(Protocol):
    """A function that samples and judges completions of prompts, one per seed."""

    def __call__(
        self, prompts: list[EncodedPrompt], seeds: list[list[int]], sampling: Sampling
    ) -> list[Judged]:
        """Return the judged completions, those of a prompt next to each other."""


class EvaluationSource:
    """Samples the batches of the evaluation sets.

    Args:
        val: sets to validate on, and to test on if ``test`` is None.
        test: sets for ``test`` and ``predict``.
        default: values for what a set leaves None.
        max_tokens: longest completion of a set that leaves it None, in tokens.
        seed: seed of the sampling noise, which depends only on seed, row and sample.

    Raises:
        ConfigurationError: a set's name or one of its values cannot be used.
    """

    def __init__(
        self,
        val: EvalSets | None,
        test: EvalSets | None,
        default: EvaluationSettings,
        max_tokens: int,
        seed: int,
    ) -> None:
        self.val = named_sets(val, "val_prompts", default, max_tokens)
        self.test = named_sets(test, "test_prompts", default, max_tokens) or self.val
        self.seed = seed
        self._sets: list[tuple[NamedSet, PromptSet]] = []

    def setup(
        self, stage: str, encode: Callable[[Prompts, str, int], PromptSet]
    ) -> list[PromptSet]:
        """Encode the sets of a stage, and return their prompts.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.
            encode: ``(prompts, name, max_tokens) -> PromptSet``.

        Raises:
            ConfigurationError: a stage that only evaluates has no set.
        """
        own_tests = stage in ("test", "predict") and self.test is not self.val
        sets, setting = (self.test, "test_prompts") if own_tests else (self.val, "val_prompts")
        if not sets and stage != "fit":
            raise ConfigurationError(
                f"`val_prompts` must be given to {stage}: got None. Give a prompt source."
            )
        self._sets = []
        for one in sets:
            name = f"{setting}.{one.name}" if one.name else setting
            self._sets.append((one, encode(one.prompts, name, one.sampling.max_tokens)))
        return [prompts for _, prompts in self._sets]

    @property
    def longest(self) -> int:
        """Longest prompt and completion together, in tokens; 0 without sets."""
        return max((p.bound + one.sampling.max_tokens for one, p in self._sets), default=0)

    def refused(self, limits: Callable[[int], list[tuple[range, str]]], rows: int) -> str:
        """Return why a prompt of the first set cannot be sampled; empty if all can.

        Args:
            limits: ``max_tokens -> [(refused prompt lengths, reason), ...]``.
            rows: rows of the model's embedding; the prompts' token ids are the student's.
        """
        one, prompts = self._sets[0]
        highest = max((max(ids) for _, ids in prompts.sample), default=0)
        if highest >= rows:
            return f"a prompt has the token id {highest}, and its embedding has {rows} rows"
        found = limits(one.sampling.max_tokens)
        sizes = {len(ids) for _, ids in prompts.sample}
        return next((why for lengths, why in found if any(n in lengths for n in sizes)), "")

    def loaders(self, world_size: int) -> list[IndexLoader]:
        """Return one loader of batch indices per set; every rank has the same number of batches."""
        return [
            IndexLoader(-(-len(rows) // (one.batch_size * world_size))) for one, rows in self._sets
        ]

    def batch(
        self,
        which: int,
        index: int,
        ranks: tuple[int, int],
        sample: SampleAndJudge,
        reward: Reward,
        temperature: float | None = None,
    ) -> EvaluationBatch:
        """Sample and judge this rank's rows of one batch: every ``world_size``-th, maybe none.

        Args:
            which: index of the set.
            index: index of the set's batch.
            ranks: (this rank, number of ranks).
            sample: samples and judges completions.
            reward: extracts the answers.
            temperature: replaces the set's temperature; None keeps it.
        """
        (one, prompts), (rank, world_size) = self._sets[which], ranks
        start, end = (b * one.batch_size * world_size for b in (index, index + 1))
        drawn = usable(prompts, range(start + rank, min(len(prompts), end), world_size))
        rows = list(drawn)
        seeds = [
            [noise_seed(self.seed, EVALUATION_NOISE, r, k) for k in range(one.samples)]
            for r in rows
        ]
        sampling = one.sampling
        if temperature is not None:
            sampling = replace(sampling, temperature=temperature)
        judged = sample(list(drawn.values()), seeds, sampling)
        return EvaluationBatch.from_judged(one, rows, judged, reward)


def usable(prompts: Sequence[EncodedPrompt], rows: Iterable[int]) -> dict[int, EncodedPrompt]:
    """Return the prompts of rows by row number; warn of rows that cannot be used, and skip them."""
    drawn = {}
    for row in rows:
        try:
            drawn[row] = prompts[row]
        except BadRow as error:
            warnings.warn(f"the evaluation leaves out a row: {error}", stacklevel=2)
    return drawn
