"""What reads tokens, lengths and numbers of a pretended GPU makes the host wait once, or never."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers import rotary_models, small_models
from helpers.pretend_cuda import Card, pretend_cuda, to_card
from kdrl_lightning.common.layout import LAYOUT_FIELDS
from kdrl_lightning.metrics.step_log import numbers
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.rollout.updates.scoring import scored
from kdrl_lightning.rollout_batch import RolloutBatch, collate, upload
from kdrl_lightning.teachers.own_prompt.groups import OwnPrompt, as_read, with_prompts


def test_several_numbers_leave_a_card_at_once() -> None:
    values = {"a": 0.1, "b": 2.5, "c": -1.0}
    metrics = {name: torch.tensor(value) for name, value in values.items()}
    metrics["d"] = torch.tensor(3)
    with pretend_cuda() as waits:
        given = {name: value.to("cuda") for name, value in metrics.items()}
        given["b"] = metrics["b"]
        waits.clear()
        found = numbers(given, ["c", "a", "missing", "b", "d"])
        assert sum(waits.values()) == 1, dict(waits)
    assert found == {"c": -1.0, "a": float(metrics["a"]), "b": 2.5, "d": 3.0}
    assert list(found) == ["c", "a", "b", "d"]


def test_parts_of_a_rollout_know_their_layout() -> None:
    here = collate([[5, 6], [7]], [[8, 1], [9, 9, 1]], [0, 1], pad_id=0)
    own = with_prompts(here, [OwnPrompt([3]), OwnPrompt([4, 4, 4])])
    with pretend_cuda() as waits:
        card = own.to("cuda")
        waits.clear()
        parts = [card.select([1]), card.replace(temperature=0.5).select([1, 0]).select([0])]
        read = [as_read(part) for part in (*parts, card)]
        known = [part.layout for part in (*parts, *read)]
        assert not waits, dict(waits)
        changed = card.replace(input_ids=card.input_ids + 1).layout  # is not known
        assert sum(waits.values()) == 1, dict(waits)
    cpu = [own.select([1]), own.select([1]), as_read(own.select([1])), as_read(own.select([1]))]
    wanted = [*cpu, as_read(own), own.replace(input_ids=own.input_ids + 1)]
    for found, batch in zip([*known, changed], wanted, strict=True):
        for name in LAYOUT_FIELDS:
            expected = getattr(batch, name)
            assert (getattr(found, name) is None) == (expected is None), name
            assert expected is None or torch.equal(getattr(found, name), expected), name


@pytest.mark.parametrize("kind", rotary_models.CASES)
def test_rotary_embeddings_by_length_need_no_wait(kind: str) -> None:
    model_type, settings = rotary_models.CASES[kind]
    scorer = Scorer(small_models.build(model_type, **settings))
    n = rotary_models.LIMIT
    rows = [list(range(2, n + 8)), [3, 4, 5], list(range(2, n - 1))]
    batch = collate([row[:-2] for row in rows], [row[-2:] for row in rows], [0, 1, 2], pad_id=0)
    with torch.no_grad():
        wanted = scorer.score(batch).logprobs
        with pretend_cuda() as waits:
            to_card(scorer)
            card = batch.to("cuda")
            waits.clear()
            found = scorer.score(card).logprobs
            del waits["transformers"]
            assert not waits, dict(waits)
    torch.testing.assert_close(found.inner, wanted, rtol=1e-4, atol=1e-5)


def test_scores_of_passes_are_joined_without_a_wait() -> None:
    batch = collate([[5, 6], [7]], [[8, 1], [9, 9, 1]], [0, 1], pad_id=0)
    with pretend_cuda() as waits:
        card = batch.to("cuda")
        waits.clear()

        def score(part: RolloutBatch) -> RolloutBatch:
            return part.replace(old_logprobs=part.completion_ids.float())

        found = scored(card, [[1], [0]], score, ("old_logprobs",)).old_logprobs
        assert not waits, dict(waits)
    assert isinstance(found, Card) and torch.equal(found.inner, batch.completion_ids.float())


def test_tensors_move_under_torchs_fake_tensors() -> None:
    with FakeTensorMode():
        assert upload(torch.zeros(2), torch.device("cuda:0")).device.type == "cuda"
