"""Whole runs on a pretended GPU: nothing mixes devices, numbers are the CPU's, waits are bounded.

The pretended GPU holds its numbers on the CPU, refuses to mix devices as CUDA does, and counts what
makes the host wait (tests/helpers/pretend_cuda.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.card_runs import train
from helpers.pretend_cuda import Card, MixedDevicesError, pretend_cuda, to_card
from helpers.short_runs import make_data, make_module
from kdrl_lightning import GKD, GRPO, KDRL, RLAD, Objective
from kdrl_lightning.callbacks import SelectiveImitationStats, WeightSyncCheck
from kdrl_lightning.engines.base import Sampling
from kdrl_lightning.engines.transformers_engine import TransformersEngine
from kdrl_lightning.engines.vllm.hub_names import HubWeights
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.tiny import TinyModel

# How often the host may wait for the card: in a micro-batch for the rows' layout; in a step for
# statistics, the norm, and whether another rank stopped; in a rollout for WeightSyncCheck.
EACH_MICRO_BATCH, EACH_STEP, EACH_ROLLOUT = 1, 3, 4
# A teacher whose whole distribution is compared runs in the update: it reads the rows' layout too,
# checks the ids, and is timed.
BY_THE_TEACHER = 3
# transformers' masks look at their padding: once in every pass, two of which share prompts.
IN_TRANSFORMERS = 4

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def student() -> str:
    return TinyModel("student").path()


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        (GRPO(), 0),
        (KDRL(kd_ratio_weight=True), 0),
        (RLAD(), 0),
        (GKD(), BY_THE_TEACHER),
        (GKD(top_k=4), 0),
    ],
    ids=["grpo", "kdrl", "rlad", "gkd", "gkd-top-k"],
)
def test_a_run_on_a_card_is_the_cpus(
    objective: Objective, more: int, student: str, tmp_path: Path
) -> None:
    found = []
    for on_card in (False, True):
        torch.manual_seed(0)
        module = make_module(student, TinyModel("teacher").path(), objective)
        callbacks = [SelectiveImitationStats(), WeightSyncCheck()]
        data = make_data(max_tokens=24)
        metrics, phases = train(
            module,
            data,
            tmp_path,
            on_card,
            callbacks=callbacks,
            accumulate_grad_batches=2,
        )
        found.append(metrics)
    assert phases.micro_batches == 8
    theirs = phases.updates.pop("transformers", 0)
    bound = 8 * (EACH_MICRO_BATCH + more) + 4 * EACH_STEP + 2 * EACH_ROLLOUT
    assert sum(phases.updates.values()) <= bound, dict(phases.updates)
    assert theirs <= 8 * IN_TRANSFORMERS
    assert found[0].keys() == found[1].keys()
    del found[0]["tokens_per_s"]
    for name, value in found[0].items():
        # The sums of a compiled or tiled head differ in their order.
        assert found[1][name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), name


def test_the_transformers_engine_decodes_on_a_card(student: str) -> None:
    model = load_causal_lm(student)
    weights = ModelWeights(model, student)
    prompts, seeds, sampling = [[2, 3, 4], [5, 6]], [[1, 2], [3, 4]], Sampling(20)

    def engine() -> TransformersEngine:
        made = TransformersEngine()
        made.setup(weights, (), 0)
        made.update_weights(weights, 0)
        return made

    wanted = engine().generate(prompts, seeds, sampling)
    with pretend_cuda() as waits:
        to_card(model)
        made = engine()
        waits.clear()
        found = made.generate(prompts, seeds, sampling)
    assert [c.ids for g in found for c in g] == [c.ids for g in wanted for c in g]
    # Each step reads its tokens; tokens and log-probabilities leave the card once, at the end.
    assert waits["_to_copy"] == 20 + 2
    assert waits.keys() == {"_to_copy", "transformers"}, dict(waits)
    assert waits["transformers"] <= 20 + 1  # the mask of prompts of unequal length


def test_weights_leave_a_card(student: str) -> None:
    model = load_causal_lm(student)
    wanted = {
        name: tensor.clone() for name, tensor in HubWeights(ModelWeights(model, student)).tensors()
    }
    with pretend_cuda():
        to_card(model)
        weights = ModelWeights(model, student)
        found = dict(HubWeights(weights).tensors())
        assert all(isinstance(tensor, Card) for tensor in found.values())
        for name, tensor in found.items():
            assert torch.equal(tensor.cpu(), wanted[name])
        state = weights.state()
        assert not any(isinstance(tensor, Card) for tensor in state.values())
    for name, tensor in state.items():
        assert torch.equal(tensor, wanted[name])


def test_mixed_devices_fail() -> None:
    with pretend_cuda() as waits:
        card = torch.ones(2, device="cuda")
        assert card.device == torch.device("cuda", 0)
        with pytest.raises(MixedDevicesError, match=r"add: .*cuda.*cpu"):
            card + torch.ones(2)
        with pytest.raises(MixedDevicesError, match="index"):
            torch.ones(3)[torch.zeros(2, dtype=torch.long, device="cuda")]
        assert (card + torch.tensor(1.0)).device.type == "cuda"  # a number may come from the host
        assert not waits


def test_waits_are_counted() -> None:
    with pretend_cuda() as waits:
        card = torch.arange(4, device="cuda")
        float(card.sum())
        card.tolist()
        card[card > 2]
        card.nonzero()
        card.cpu()
        card + 1
        assert waits == {
            "_local_scalar_dense": 1,
            "_to_copy": 2,
            "index by a mask": 1,
            "nonzero": 1,
        }
