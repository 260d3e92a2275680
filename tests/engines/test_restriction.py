"""min-p, top-k and top-p against transformers' own, and in the engine that samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from helpers.reference import normal
from kdrl_lightning.engines import Sampling, TransformersEngine
from kdrl_lightning.engines.restriction import restricted
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.models.weights import ModelWeights

PROMPTS, SEEDS = [[5, 9, 13], [7]], [list(range(200)), list(range(200, 400))]


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-6])
@pytest.mark.parametrize("top_k", [0, 1, 4, 50])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.4, 1.0])
def test_the_same_tokens_stay_as_with_transformers(top_p: float, top_k: int, min_p: float) -> None:
    logits = 2.0 * normal(20, 11, seed=3).float()
    expected: Any = logits
    ids: Any = None
    if min_p:
        expected = MinPLogitsWarper(min_p)(ids, expected)
    if top_k:
        expected = TopKLogitsWarper(top_k)(ids, expected)
    if top_p < 1.0:
        expected = TopPLogitsWarper(top_p)(ids, expected)
    got = restricted(logits, Sampling(8, 0.7, top_p, top_k, min_p))
    assert torch.equal(got, expected)
    assert torch.equal(got.argmax(-1), logits.argmax(-1))


def test_the_smallest_set_that_reaches_top_p_stays() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    for top_p, kept in ((0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.95, 4)):
        left = restricted(logits, Sampling(8, top_p=top_p))
        assert int(left.isfinite().sum()) == kept


@pytest.fixture(scope="module")
def engine(student_folder: str) -> TransformersEngine:
    made = TransformersEngine()
    made.setup(ModelWeights(load_causal_lm(student_folder), student_folder), 1, 0)
    return made


def test_the_first_token_follows_the_restricted_distribution(engine: TransformersEngine) -> None:
    sampling = Sampling(1, 1.3, top_p=0.6, top_k=6)
    for prompt, group in zip(PROMPTS, engine.generate(PROMPTS, SEEDS, sampling), strict=True):
        with torch.no_grad():
            logits = engine._model(input_ids=torch.tensor([prompt])).logits[0, -1:] / 1.3
        scores = restricted(logits, sampling).log_softmax(-1)[0]
        drawn = torch.tensor([one.ids[0] for one in group])
        assert scores[drawn].isfinite().all()
        reported = torch.tensor([one.logprobs[0] for one in group])
        torch.testing.assert_close(scores[drawn], reported, rtol=1e-5, atol=1e-5)
        often = torch.bincount(drawn, minlength=len(scores)) / len(drawn)
        assert (often - scores.exp()).abs().max() < 0.12  # 3.4 standard errors of 200 draws


@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_one_token_left_is_greedy(engine: TransformersEngine, limit: dict[str, Any]) -> None:
    seeds = [[1, 2], [3]]
    greedy = engine.generate(PROMPTS, seeds, Sampling(8, 0.0))
    got = engine.generate(PROMPTS, seeds, Sampling(8, 0.9, **limit))
    assert [[c.ids for c in g] for g in got] == [[c.ids for c in g] for g in greedy]


def test_nothing_left_out_is_the_plain_distribution(engine: TransformersEngine) -> None:
    seeds = [[1, 2], [3]]
    plain = engine.generate(PROMPTS, seeds, Sampling(8, 0.9))
    assert engine.generate(PROMPTS, seeds, Sampling(8, 0.9, 1.0, 0, 0.0)) == plain
    assert engine.generate(PROMPTS, seeds, Sampling(8, 0.9, 1.0, 10**6)) == plain
