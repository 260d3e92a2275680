"""Passes of rows of similar length: which rows they hold, and that scores do not depend on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import scored_models
from kdrl_lightning.models.passes import shared_prompts as classes
from kdrl_lightning.models.passes.shared_prompts import LEAST_SAVING, LEAST_TOKENS, width_classes
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.rollout_batch import RolloutBatch, collate


@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=24))
def test_every_row_is_in_one_pass_that_is_wide_enough_and_no_wider(lengths: list[int]) -> None:
    found = width_classes(lengths)
    assert sorted(r for c in found for r in c.rows) == list(range(len(lengths)))
    for c in found:
        assert c.width == max(lengths[r] for r in c.rows)
        assert c.tokens >= LEAST_TOKENS or len(found) == 1
    whole = len(lengths) * max(lengths)
    assert sum(c.tokens for c in found) <= whole * (1 - LEAST_SAVING * (len(found) > 1))


def test_a_cut_has_to_save_enough() -> None:
    assert len(width_classes([9000, 10_000])) == 2  # 5 %
    assert len(width_classes([9700, 10_000])) == 1  # 1.5 %
    assert len(width_classes([100, 10_000])) == 1  # a pass of 100 tokens does not pay


@pytest.fixture
def batch() -> RolloutBatch:
    prompts = [[3, 4, 5], [6, 7], [3, 4, 5], [8, 9, 10, 11]]
    completions = [[5] * 2, list(range(2, 12)), [4, 1], [7, 6, 5]]
    return collate(prompts, completions, [0, 1, 0, 2], pad_id=0)


@pytest.mark.parametrize("shares", [False, True])
def test_scores_states_and_gradients_do_not_depend_on_the_passes(
    batch: RolloutBatch, monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    found = []
    for least in (LEAST_TOKENS, 1):
        monkeypatch.setattr(classes, "LEAST_TOKENS", least)
        scorer = Scorer(scored_models.build("Qwen3ForCausalLM", dtype=torch.float64))
        scorer.shares = shares  # equal rows run once; prompts only if that saves enough
        widths: list[tuple[int, ...]] = []
        run = scorer._pass

        def seen(ids: Tensor, lengths: Tensor, run: Any = run, widths: Any = widths) -> Tensor:
            widths.append(tuple(ids.shape))
            return run(ids, lengths)

        monkeypatch.setattr(scorer, "_pass", seen)
        scorer.sharing.below = 0.0
        scores = scorer.score(batch, top_k=1)
        (scores.logprobs.sum() + scores.entropy.sum()).backward()
        states = scorer.states(batch).hidden
        gradients = [p.grad for p in scorer.parameters()]
        found.append((scores.logprobs, states, *gradients))
        assert widths[: len(widths) // 2] == ([(4, 12)] if least > 1 else [(2, 5), (1, 7), (1, 12)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_sharded_model_runs_all_rows_in_one_pass(
    batch: RolloutBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classes, "LEAST_TOKENS", 1)
    scorer = Scorer(scored_models.build("Qwen3ForCausalLM"))
    host = batch.input_ids, batch.prompt_lengths, batch.completion_mask
    assert len(scorer._classes(host, None)) == 3
    scorer.sharded = True
    assert not scorer._classes(host, None)
