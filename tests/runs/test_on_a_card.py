"""Whole runs on a pretended GPU: no mixed devices, the CPU's numbers, a bounded number of waits.

The pretended GPU holds its numbers on the CPU, refuses to mix devices as CUDA does, and counts what
makes the host wait (tests/helpers/pretend_cuda.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from helpers.card_runs import train
from helpers.pretend_cuda import Card, MixedDevicesError, pretend_cuda, to_card
from helpers.short_runs import make_data, make_module
from kdrl_lightning import (
    GKD,
    GRPO,
    KDRL,
    RLAD,
    SFT,
    ColumnContext,
    LocalTeacher,
    Objective,
    PromptedTeacher,
    TeacherPrompt,
)
from kdrl_lightning.callbacks import FSDPCheckpoint, SelectiveImitationStats, WeightSyncCheck
from kdrl_lightning.engines.base import Sampling
from kdrl_lightning.engines.transformers_engine import TransformersEngine, _draw
from kdrl_lightning.engines.vllm.hub_names import HubWeights
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.teachers import MovingAverage, SelfTeacher
from kdrl_lightning.tiny import TinyModel

# How often the host may wait for the card: never in a micro-batch; in a step for statistics, the
# norm, and whether another rank stopped, and for sums, maxima, histograms and groups of
# SelectiveImitationStats; in a rollout for WeightSyncCheck.
EACH_STEP, EACH_ROLLOUT = 3 + 4, 4
# transformers' masks look at their padding: once in every pass, two of which share prompts.
IN_TRANSFORMERS = 4

pytestmark = pytest.mark.filterwarnings("ignore")


SMALL: dict[str, Any] = {"val_prompts": None, "prompts_per_rollout": 2, "group_size": 2}


@pytest.fixture(scope="module")
def student() -> str:
    return TinyModel("student").path()


def same_metrics(on_cpu: dict[str, float], on_card: dict[str, float]) -> None:
    assert on_cpu.keys() == on_card.keys()
    for name, value in on_cpu.items():
        if name != "tokens_per_s":
            # The sums of a compiled or tiled head differ in their order.
            assert on_card[name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), name


@pytest.mark.parametrize(
    "objective",
    [GRPO(), KDRL(kd_ratio_weight=True), RLAD(), GKD(), GKD(top_k=4)],
    ids=["grpo", "kdrl", "rlad", "gkd", "gkd-top-k"],
)
def test_a_run_on_a_card_is_the_cpus(objective: Objective, student: str, tmp_path: Path) -> None:
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
    bound = 4 * EACH_STEP + 2 * EACH_ROLLOUT
    assert sum(phases.updates.values()) <= bound, dict(phases.updates)
    assert theirs <= 8 * IN_TRANSFORMERS
    same_metrics(*found)


def test_a_run_of_the_teachers_completions(student: str, tmp_path: Path) -> None:
    found = []
    for on_card in (False, True):
        module = make_module(student, TinyModel("teacher").path(), SFT())
        data = make_data(
            **{**SMALL, "group_size": 0, "minibatches_per_rollout": 1},
            max_tokens=8,
            teacher_completions=2,
        )
        metrics, phases = train(module, data, tmp_path, on_card, max_steps=2)
        found.append(metrics)
    theirs = phases.updates.pop("transformers", 0)
    assert theirs <= phases.micro_batches * IN_TRANSFORMERS
    assert sum(phases.updates.values()) <= 2 * 3, dict(phases.updates)
    same_metrics(*found)


def test_a_run_in_16_bits(student: str, tmp_path: Path) -> None:
    """Autocast, 16-bit products with float32 results, and an engine in 16 bits."""
    found = []
    for on_card in (False, True):
        torch.manual_seed(0)
        module = make_module(student, LocalTeacher(TinyModel("teacher"), "bfloat16"), KDRL())
        data = make_data(**SMALL, max_tokens=8)
        precision = "bf16-mixed" if on_card else "32-true"
        metrics, phases = train(module, data, tmp_path, on_card, max_steps=2, precision=precision)
        found.append(metrics)
    theirs = phases.updates.pop("transformers", 0)
    assert theirs <= phases.micro_batches * IN_TRANSFORMERS
    assert sum(phases.updates.values()) <= 2 * 3, dict(phases.updates)
    for name in ("policy/entropy", "loss/total"):
        assert found[1][name] == pytest.approx(found[0][name], abs=0.02), name


def test_a_checkpoint_of_a_card(student: str, tmp_path: Path) -> None:
    """It holds the CPU's numbers, the moving average of a self-teacher too, and a card goes on."""
    states, found = {}, []
    for on_card in (False, True):

        def run(folder: Path, on_card: bool = on_card, **settings: Any) -> dict[str, float]:
            prompt = TeacherPrompt(ColumnContext("answer"), "{context}#{prompt}")
            teacher = PromptedTeacher(SelfTeacher(MovingAverage(0.25)), prompt)
            module = make_module(student, teacher, KDRL())
            return train(module, make_data(**SMALL, max_tokens=8), folder, on_card, **settings)[0]

        folder = tmp_path / str(on_card)
        saver = FSDPCheckpoint(monitor=None, asynchronous=on_card)
        run(folder, max_steps=2, callbacks=[saver], enable_checkpointing=True)
        states[on_card] = torch.load(saver.last_model_path, weights_only=True)
        found.append(run(folder, max_steps=4, resumes=saver.last_model_path))
    same_metrics(*found)
    for part in ("state_dict", "optimizer_states"):
        ours, theirs = (tree_leaves(states[on_card][part]) for on_card in (True, False))
        assert len(ours) == len(theirs) > 4
        for mine, wanted in zip(ours, theirs, strict=True):
            if isinstance(wanted, torch.Tensor):
                assert mine.device.type == "cpu" and not isinstance(mine, Card)
                torch.testing.assert_close(mine, wanted, rtol=2e-3, atol=1e-5)
    assert any("self_teachers" in name for name in states[True]["state_dict"])


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1, top_p=0.8), Sampling(1, top_k=3), Sampling(1, min_p=0.2), Sampling(1, 0.0)],
)
def test_an_evaluation_draws_from_a_part_of_the_tokens_on_a_card(sampling: Sampling) -> None:
    logits, rows, noise = torch.randn(3, 9), torch.tensor([0, 1, 1, 2]), torch.rand(4)
    wanted = _draw(logits, rows, noise, sampling)
    with pretend_cuda() as waits:
        given = [x.to("cuda") for x in (logits, rows, noise)]
        waits.clear()
        found = _draw(*given, sampling)
        assert not waits, dict(waits)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.inner, theirs)


@pytest.mark.parametrize("computes", [None, torch.bfloat16], ids=["live", "copy-in-bf16"])
def test_the_transformers_engine_decodes_on_a_card(
    student: str, computes: torch.dtype | None
) -> None:
    model = load_causal_lm(student)
    weights = ModelWeights(model, student, compute_dtype=computes)
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
    assert waits.keys() == {"_to_copy", "transformers", "upload"}, dict(waits)
    assert waits["upload"] <= 3  # prompts, their mask, and the noise of all steps
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


def test_parameters_move_in_place() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    with pretend_cuda():
        for move in (to_card, lambda m: m.to("cuda"), lambda m: m.cpu()):
            before = list(model.parameters())
            move(model)
            assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
            assert model[1].weight is model[0].weight
            assert isinstance(model[0].weight, torch.nn.Parameter)
        assert not isinstance(model[0].weight, Card)
        model[0].weight.data = torch.ones(2, 2, device="cuda")
        assert isinstance(model[1].weight, Card) and model[1].weight.requires_grad


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
