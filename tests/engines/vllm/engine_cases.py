"""Real vLLM in this process: ``test_engine`` runs these cases in a separate process."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.engines import ids
from helpers.with_vllm.models import CASES, CONTEXT, EOS, PAD, make_model, save_model, worst_gap
from kdrl_lightning import LoRA
from kdrl_lightning.engines import Sampling, TransformersEngine, VLLMEngine
from kdrl_lightning.engines.restriction import restricted
from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.models.weights import ModelWeights

PROMPTS = [[5, 9, 13, 4, 15], [7], [3, 14, 3, 3], [12, 11, 10], [4] * 7, [6, 13, 8]]
SEEDS = [[100 * i + j for j in range(4)] for i in range(len(PROMPTS))]
BOUND = 1e-4  # float32, by two implementations


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model("qwen2", tmp_path_factory.mktemp("qwen2"))


@pytest.fixture(scope="module")
def started(folder: str, model: Any) -> VLLMEngine:
    os.environ.update(RANK="0", WORLD_SIZE="1")  # as a launcher leaves them
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    made = VLLMEngine(kv_cache_memory_bytes=64 << 20)
    made.setup(ModelWeights(model, folder), EOS, PAD)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == before, "starting an engine moves the random state"
    assert (os.environ.pop("RANK"), os.environ.pop("WORLD_SIZE")) == ("0", "1")
    return made


@pytest.fixture
def engine(started: VLLMEngine, model: Any, folder: str) -> VLLMEngine:
    weights = ModelWeights(model, folder)
    started.setup(weights, EOS, PAD)
    started.update_weights(weights, 0)
    return started


def test_same_seeds_give_the_same_whatever_else_is_asked(engine: VLLMEngine) -> None:
    sampling = Sampling(16)
    whole = engine.generate(PROMPTS, SEEDS, sampling)
    assert engine.generate(PROMPTS, SEEDS, sampling) == whole
    order = [3, 0, 5, 4, 1, 2]
    mixed = engine.generate([PROMPTS[i] for i in order], [SEEDS[i][::-1] for i in order], sampling)
    assert ids(mixed) == [[c.ids for c in whole[i][::-1]] for i in order]
    alone = [[engine.generate([PROMPTS[0]], [[s]], sampling)[0][0].ids for s in SEEDS[0]]]
    assert alone == ids(whole[:1])
    uneven = [SEEDS[0][:1], [], *SEEDS[2:]]
    assert ids(engine.generate(PROMPTS, uneven, sampling)) == [
        [c.ids for c in group[: len(own)]] for group, own in zip(whole, uneven, strict=True)
    ]
    assert len({tuple(c.ids) for c in engine.generate([[7]], [list(range(20))], sampling)[0]}) > 15


def test_greedy_is_that_of_the_transformers_engine(
    engine: VLLMEngine, model: Any, folder: str
) -> None:
    exact = TransformersEngine()
    exact.setup(ModelWeights(model, folder), EOS, PAD)
    greedy = Sampling(24, temperature=0.0)
    ours, theirs = (e.generate(PROMPTS, [[0]] * 6, greedy) for e in (engine, exact))
    assert ids(ours) == ids(theirs)
    assert worst_gap(model, PROMPTS, ours) < BOUND  # at temperature 1, as promised


def test_improbable_tokens_are_left_out(engine: VLLMEngine, model: Any) -> None:
    greedy = ids(engine.generate(PROMPTS, SEEDS, Sampling(12, 0.0)))
    for limit in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert ids(engine.generate(PROMPTS, SEEDS, Sampling(12, 1.0, **limit))) == greedy
    sampling = Sampling(1, 2.0, top_p=0.7, top_k=12)
    ((*group,),) = engine.generate([PROMPTS[0]], [list(range(300))], sampling)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1:]
    scores = restricted(logits / 2.0, sampling).log_softmax(-1)[0]
    assert {c.ids[0] for c in group} <= set(scores.isfinite().nonzero().flatten().tolist())
    for one in group:
        assert one.logprobs[0] == pytest.approx(scores[one.ids[0]].item(), abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_logprobs_are_the_trainers(engine: VLLMEngine, model: Any, temperature: float) -> None:
    groups = engine.generate(PROMPTS, SEEDS, Sampling(32, temperature))
    assert worst_gap(model, PROMPTS, groups, temperature) < BOUND
    other = 0.9 if temperature == 1.0 else 1.0
    assert worst_gap(model, PROMPTS, groups, other) > 100 * BOUND


def test_first_token_follows_the_softmax(engine: VLLMEngine, model: Any) -> None:
    draws = 3000
    ((*group,),) = engine.generate([PROMPTS[0]], [list(range(draws))], Sampling(1, 0.7))
    counts = np.bincount([c.ids[0] for c in group], minlength=40)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    due = draws * (logits / 0.7).softmax(-1).numpy()
    common = due >= 5
    statistic = float(((counts - due)[common] ** 2 / due[common]).sum())
    freedom = int(common.sum())
    assert freedom >= 5
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_completions_end_at_the_end_token_or_at_the_limit(engine: VLLMEngine) -> None:
    seeds = [list(range(200))]
    (long,) = engine.generate([PROMPTS[0]], seeds, Sampling(60))
    (short,) = engine.generate([PROMPTS[0]], seeds, Sampling(4))
    assert {c.truncated for c in short} == {True, False}
    for c, start in zip(long, short, strict=True):
        assert c.truncated == (EOS not in c.ids)
        assert c.ids.index(EOS) == len(c.ids) - 1 if not c.truncated else len(c.ids) == 60
        assert len(c.logprobs) == len(c.ids)
        assert start.ids == c.ids[:4]
    (one,) = engine.generate([PROMPTS[0]], seeds, Sampling(1))
    ended = [c for c in one if c.ids == [EOS]]
    assert ended and not any(c.truncated for c in ended)


def test_the_end_token_is_the_one_that_setup_names(
    engine: VLLMEngine, model: Any, folder: str
) -> None:
    other = engine.generate([[7]], [list(range(50))], Sampling(40))[0][0].ids[2]
    engine.setup(ModelWeights(model, folder), other, PAD)
    (group,) = engine.generate([[7]], [list(range(50))], Sampling(40))
    assert any(EOS in c.ids[:-1] for c in group)
    assert all(c.truncated == (c.ids[-1] != other) and other not in c.ids[:-1] for c in group)


def test_after_an_update_the_new_weights_sample(
    engine: VLLMEngine, model: Any, folder: str
) -> None:
    # Longer than a cached block (128 tokens on a CPU), so that old keys and values would be met.
    prompts = [[3 + (i * k) % 37 for i in range(300)] for k in (1, 2, 5)]
    seeds = [[0, 1, 2]] * 3
    new = make_model("qwen2", seed=7)
    before = engine.generate(prompts, seeds, Sampling(8))
    engine.update_weights(ModelWeights(new, folder), 1)
    after = engine.generate(prompts, seeds, Sampling(8))
    assert engine.version == 1
    assert worst_gap(model, prompts, before) < BOUND
    assert worst_gap(new, prompts, after) < BOUND
    assert worst_gap(model, prompts, after) > 0.1
    engine.update_weights(ModelWeights(model, folder), 2)
    assert ids(engine.generate(prompts, seeds, Sampling(8))) == ids(before)


def test_a_small_step_is_seen(engine: VLLMEngine, folder: str) -> None:
    new = make_model("qwen2", seed=0)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter += 1e-3 * torch.randn_like(parameter)
    engine.update_weights(ModelWeights(new, folder), 1)
    groups = engine.generate(PROMPTS, SEEDS, Sampling(16))
    assert worst_gap(new, PROMPTS, groups) < BOUND
    assert worst_gap(make_model("qwen2", seed=0), PROMPTS, groups) > 10 * BOUND


def test_adapters_arrive_merged(engine: VLLMEngine, model: Any, folder: str) -> None:
    student = load_causal_lm(folder)
    LoRA(4, target_modules=["q_proj", "o_proj", "up_proj"]).inject(student, 0)
    old = engine.generate(PROMPTS, SEEDS, Sampling(16))
    adapters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=0.02)
    ids_ = torch.tensor([PROMPTS[0]])
    for version in (1, 2):
        student(input_ids=ids_, labels=ids_).loss.backward()
        optimizer.step()
        engine.update_weights(ModelWeights(student, folder), version)
        new = engine.generate(PROMPTS, SEEDS, Sampling(16))
        assert worst_gap(student, PROMPTS, new) < BOUND
        assert worst_gap(student, PROMPTS, old) > 100 * BOUND
        assert worst_gap(model, PROMPTS, new) > 100 * BOUND  # the base
        old = new


REFUSED = {
    "empty": ([[]], 4, r"must have at least one token: got none in row 0"),
    "unknown id": ([[5], [5, 40]], 4, r"must be in \[0, 39\]: got 40 in row 1"),
    "negative id": ([[-1]], 4, r"must be in \[0, 39\]: got -1 in row 0"),
    "too long": ([[5] * 500], 13, r"must fit the engine's 512 tokens: got 500 \+ 13 in row 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_prompts_that_would_bring_the_engine_down_are_refused(
    engine: VLLMEngine, case: str
) -> None:
    prompts, tokens, words = REFUSED[case]
    with pytest.raises(TrainingStopped, match=words):
        engine.generate(prompts, [[0]] * len(prompts), Sampling(tokens))
    assert engine.generate([[5]], [[0]], Sampling(2))[0][0].ids


def test_the_longest_prompt_fits(engine: VLLMEngine, model: Any) -> None:
    prompts = [[5, 6, 7, 8] * ((CONTEXT - 4) // 4)]
    groups = engine.generate(prompts, [[0, 1]], Sampling(4))
    assert worst_gap(model, prompts, groups) < BOUND


def test_more_prompt_tokens_than_a_step_takes(engine: VLLMEngine, model: Any) -> None:
    """On a CPU, vLLM fails if it cuts a prompt whose request has a seed."""
    length = min(CONTEXT - 4, 100)
    rows = [
        [2 + (i + j) % (model.config.vocab_size - 2) for i in range(length)]
        for j in range(5000 // length)
    ]
    made = engine.generate(rows, [[j] for j in range(len(rows))], Sampling(2))
    assert len(made) == len(rows) and all(len(group[0].ids) for group in made)


def test_threads_can_still_be_set(engine: VLLMEngine) -> None:
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_autocast_of_the_trainer_is_not_the_engines(engine: VLLMEngine, model: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        groups = engine.generate(PROMPTS, SEEDS, Sampling(8))
    assert worst_gap(model, PROMPTS, groups) < BOUND


def test_weights_of_another_model_are_one_clear_error(engine: VLLMEngine, folder: str) -> None:
    engine.generate([[5]], [[0]], Sampling(2))  # it can run this model
    with pytest.raises(TrainingStopped, match=r"vLLM could not take the weights: "):
        engine.update_weights(ModelWeights(make_model("llama", 0).model, folder), 3)


def test_an_engine_that_dies_stops_the_run_and_can_be_started_anew(
    engine: VLLMEngine, model: Any, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("kdrl_lightning.engines.vllm.engine.check_requests", lambda *_: None)
        with pytest.raises(TrainingStopped, match=r"vLLM could not sample: IndexError: index out"):
            engine.generate([[99]], [[0]], Sampling(4))
    with pytest.raises(TrainingStopped, match=r"vLLM has stopped"):
        engine.generate([[5]], [[0]], Sampling(4))
    assert engine.version is None  # the data module sets it up again
    engine.setup(ModelWeights(model, folder), EOS, PAD)
    with pytest.raises(TrainingStopped, match=r"must have weights to sample from"):
        engine.generate([[5]], [[0]], Sampling(4))
    engine.update_weights(ModelWeights(model, folder), 4)
    assert worst_gap(model, PROMPTS, engine.generate(PROMPTS, SEEDS, Sampling(8))) < BOUND


@pytest.mark.parametrize("name", [name for name in CASES if name != "qwen2"])
def test_architectures_tied_and_untied(name: str, tmp_path: Path) -> None:
    path = save_model(name, tmp_path)
    engine = VLLMEngine(kv_cache_memory_bytes=16 << 20, max_model_len=64)
    for seed in (0, 3):
        model = make_model(name, seed)
        if seed == 0:
            engine.setup(ModelWeights(model, path), EOS, PAD)
        engine.update_weights(ModelWeights(model, path), seed)
        groups = engine.generate(PROMPTS, SEEDS, Sampling(16))
        assert worst_gap(model, PROMPTS, groups) < BOUND
        assert worst_gap(make_model(name, 3 - seed), PROMPTS, groups) > 0.1


def test_bfloat16_is_close(tmp_path: Path) -> None:
    path = save_model("qwen2-tied", tmp_path)
    model = make_model("qwen2-tied", 0)
    engine = VLLMEngine(kv_cache_memory_bytes=16 << 20, dtype="bfloat16")
    engine.setup(ModelWeights(model, path), EOS, PAD)
    engine.update_weights(ModelWeights(model, path), 0)
    assert engine.dtype == torch.bfloat16
    gap = worst_gap(model, PROMPTS, engine.generate(PROMPTS, SEEDS, Sampling(16)))
    assert 1e-4 < gap < 0.5


def test_a_model_that_vllm_cannot_run_is_one_clear_error(tmp_path: Path, model: Any) -> None:
    words = r"must be an engine that can run /no/model: got VLLMEngine"
    with pytest.raises(ConfigurationError, match=words):
        VLLMEngine().setup(ModelWeights(model, "/no/model"), EOS, PAD)
