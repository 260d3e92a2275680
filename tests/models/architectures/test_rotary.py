"""Rotary embeddings that change with length: each row is embedded as it would be alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers.engines import engine_for
from helpers.rotary_models import CASES, LIMIT
from helpers.small_models import build
from kdrl_lightning.engines import Sampling
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.architectures.rotary import decide_per_row, switch_lengths
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.rollout_batch import collate

PROMPT = 10
every = pytest.mark.parametrize("name", CASES)


def make(name: str) -> Any:
    model_type, settings = CASES[name]
    return build(model_type, **settings)


def make_rows() -> list[list[int]]:
    """Rows on both sides of the switch, at it, and two beyond it that differ in length."""
    draw = torch.Generator().manual_seed(1)
    rows = [torch.randint(2, 90, (n,), generator=draw).tolist() for n in (20, 50, 31, 32, 33, 41)]
    for row in rows:
        row[:PROMPT] = rows[0][:PROMPT]
    return rows


@torch.no_grad()
def alone(name: str, row: list[int], prompt: int = PROMPT) -> torch.Tensor:
    """From a fresh model: dynamic frequencies depend on what a model has seen before."""
    logits = make(name)(input_ids=torch.tensor([row])).logits[0, prompt - 1 : -1].log_softmax(-1)
    return logits.gather(-1, torch.tensor(row[prompt:])[:, None]).squeeze(-1)


@every
@pytest.mark.parametrize("shares", [True, False])
def test_scores_are_those_of_each_row_alone(name: str, shares: bool) -> None:
    scorer, rows = Scorer(make(name)), make_rows()
    scorer.verify(name)
    assert scorer.pads  # else every length has a separate pass, which would be right as well
    scorer.shares = shares
    batch = collate(
        [r[:PROMPT] for r in rows], [r[PROMPT:] for r in rows], [0] * len(rows), pad_id=0
    )
    for _ in range(2):  # what came before changes nothing
        with torch.no_grad():
            scores = scorer.score(batch).logprobs
        for row, found in zip(rows, scores, strict=True):
            torch.testing.assert_close(
                found[: len(row) - PROMPT], alone(name, row), atol=1e-5, rtol=1e-4
            )


@every
def test_a_batch_of_the_plain_model_gives_other_scores(name: str) -> None:
    rows = make_rows()
    ids = torch.tensor([rows[0] + [0] * 30, rows[1]])
    with torch.no_grad():
        logits = make(name)(input_ids=ids).logits[0, PROMPT - 1 : 19].log_softmax(-1)
    found = logits.gather(-1, ids[0, PROMPT:20, None]).squeeze(-1)
    assert (found - alone(name, rows[0])).abs().max() > 0.1


@every
def test_a_second_call_changes_nothing(name: str) -> None:
    model = make(name)
    decide_per_row(model)
    forwards = [m.forward for m in model.modules() if hasattr(m, "rope_type")]
    decide_per_row(model)
    assert forwards == [m.forward for m in model.modules() if hasattr(m, "rope_type")]
    assert switch_lengths(model) == [(LIMIT, name != "longrope")]


@pytest.mark.parametrize(
    ("name", "prompts", "tokens"),
    [(name, (10, 5), 22) for name in CASES] + [("longrope", (33, 40), 9)],
)
def test_samples_on_one_side_are_scored_as_they_were_drawn(
    name: str, prompts: tuple[int, int], tokens: int
) -> None:
    row = make_rows()[1]
    groups = engine_for(make(name), name).generate(
        [row[:n] for n in prompts], [[1, 2], [5]], Sampling(tokens)
    )
    for length, group in zip(prompts, groups, strict=True):
        for one in group:
            wanted = alone(name, row[:length] + one.ids, length)
            torch.testing.assert_close(torch.tensor(one.logprobs), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "prompt"), [*((name, 10) for name in CASES), ("dynamic", 40), ("longrope", 32)]
)
def test_samples_that_may_cross_are_refused(name: str, prompt: int) -> None:
    words = (
        rf"`max_tokens` must keep a prompt of {prompt} tokens and its completion within 32 tokens, "
        r"beyond which the rotary embedding of \w+ changes for the whole row: got 23\. Lower it, "
        r"or shorten the prompts with `max_prompt_tokens`\."
    )
    with pytest.raises(ConfigurationError, match=words):
        engine_for(make(name), name).generate([make_rows()[1][:prompt]], [[1]], Sampling(23))
