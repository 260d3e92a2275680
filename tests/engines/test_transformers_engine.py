"""The hand-written decode loop against transformers' own, and against the scorer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from helpers.engines import ids
from kdrl_lightning.engines import Completion, Sampling, TransformersEngine
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rollout_batch import collate

PAD, EOS = 0, 1
PROMPTS = [[5, 9, 13, 4, 15], [7], [3, 14, 3, 3], [12, 11, 10], [4, 4, 4, 4, 4, 4, 4], [6, 13, 8]]
SEEDS = [[100 * i + j for j in range(4)] for i in range(len(PROMPTS))]
Build = Callable[..., TransformersEngine]


@pytest.fixture(scope="module")
def model(student_folder: str) -> Any:
    return load_causal_lm(student_folder)


@pytest.fixture
def build(model: Any, student_folder: str) -> Build:
    def engine(max_sequences: int = 256, eos: int = EOS) -> TransformersEngine:
        made = TransformersEngine(max_sequences)
        made.setup(ModelWeights(model, student_folder), eos, PAD)
        return made

    return engine


def flatten(groups: list[list[Completion]]) -> list[Completion]:
    return list(chain.from_iterable(groups))


def close(a: list[list[Completion]], b: list[list[Completion]]) -> None:
    """Same tokens and flags, log-probabilities within float32 noise."""
    assert ids(a) == ids(b)
    for one, other in zip(flatten(a), flatten(b), strict=True):
        assert one.truncated == other.truncated
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_greedy_equals_generate_token_for_token(build, model):
    new, width = 12, max(map(len, PROMPTS))
    padded = torch.tensor([[PAD] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    reference = model.generate(
        padded,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )[:, width:].tolist()
    expected = [row[: row.index(EOS) + 1] if EOS in row else row for row in reference]
    got = build().generate(PROMPTS, SEEDS, Sampling(new, temperature=0.0))
    assert ids(got) == [[row] * 4 for row in expected]


def test_greedy_equals_generate_where_the_end_token_comes_early(build, model):
    # Make the end token the one that greedy decoding of some prompt reaches on its way.
    free = build(eos=-1).generate(PROMPTS, [[0]] * 6, Sampling(12, temperature=0.0))
    eos = free[0][0].ids[3]
    got = build(eos=eos).generate(PROMPTS, [[0]] * 6, Sampling(12, temperature=0.0))
    for (whole,), (stopped,) in zip(free, got, strict=True):
        end = whole.ids.index(eos) + 1 if eos in whole.ids else 12
        assert stopped.ids == whole.ids[:end]
        assert stopped.truncated == (eos not in whole.ids)


OTHERS = {
    "LlamaForCausalLM": ("LlamaConfig", {}),
    "Qwen3ForCausalLM": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    # Its window is shorter than the prompts: the cache forgets, and rows leave it all the same.
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 4}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_decode_as_generate_and_score_as_the_scorer(name):
    config, own = OTHERS[name]
    settings = {
        "vocab_size": 17,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": EOS,
    }
    torch.manual_seed(0)
    other = getattr(transformers, name)(getattr(transformers, config)(**{**settings, **own}))
    engine = TransformersEngine(5)
    engine.setup(ModelWeights(other.eval(), name), EOS, PAD)
    greedy = engine.generate(PROMPTS, [[0]] * 6, Sampling(10, temperature=0.0))
    for prompt, (completion,) in zip(PROMPTS, greedy, strict=True):
        reference = other.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=10,
        )
        assert completion.ids == reference[0, len(prompt) :].tolist()
    groups = engine.generate(PROMPTS, SEEDS, Sampling(10, 0.8))
    for i, group in enumerate(groups):
        batch = collate([PROMPTS[i]] * 4, [c.ids for c in group], [i] * 4, pad_id=PAD)
        with torch.no_grad():
            scores = Scorer(other).score(batch.replace(temperature=0.8))
        for c, row in zip(group, scores.logprobs.tolist(), strict=True):
            assert c.logprobs == pytest.approx(row[: len(c.ids)], abs=1e-5)


def test_the_default_type_changes_nothing(build):
    expected = build().generate(PROMPTS, SEEDS, Sampling(8))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert build().generate(PROMPTS, SEEDS, Sampling(8)) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_greedy_ignores_the_seeds(build):
    sampling = Sampling(8, temperature=0.0)
    other = [[s + 7 for s in own] for own in SEEDS]
    close(build().generate(PROMPTS, SEEDS, sampling), build().generate(PROMPTS, other, sampling))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_logprobs_equal_the_scorers(build, model, temperature):
    groups = build().generate(PROMPTS, SEEDS, Sampling(16, temperature))
    flat = [(i, c) for i, group in enumerate(groups) for c in group]
    batch = collate(
        [PROMPTS[i] for i, _ in flat],
        [c.ids for _, c in flat],
        [i for i, _ in flat],
        pad_id=PAD,
        rollout_logprobs=[c.logprobs for _, c in flat],
    ).replace(temperature=temperature)
    with torch.no_grad():
        scores = Scorer(model).score(batch)
    torch.testing.assert_close(batch.rollout_logprobs, scores.logprobs, atol=1e-5, rtol=0)


def test_greedy_logprobs_are_those_at_temperature_1(build, model):
    ((one,),) = build().generate([PROMPTS[0]], [[0]], Sampling(6, temperature=0.0))
    batch = collate([PROMPTS[0]], [one.ids], [0], pad_id=PAD)
    with torch.no_grad():
        scores = Scorer(model).score(batch)
    assert one.logprobs == pytest.approx(scores.logprobs[0].tolist(), abs=1e-5)


def test_a_completion_alone_equals_itself_in_a_batch(build):
    sampling = Sampling(16)
    together = build().generate(PROMPTS, SEEDS, sampling)
    alone = [
        [build().generate([prompt], [[seed]], sampling)[0][0] for seed in own]
        for prompt, own in zip(PROMPTS, SEEDS, strict=True)
    ]
    close(together, alone)


@pytest.mark.parametrize("max_sequences", [1, 3, 5, 23])
def test_the_number_of_sequences_at_once_changes_nothing(build, max_sequences):
    sampling = Sampling(16)
    close(
        build(max_sequences).generate(PROMPTS, SEEDS, sampling),
        build().generate(PROMPTS, SEEDS, sampling),
    )


def test_the_order_of_prompts_changes_nothing(build):
    order = [3, 0, 5, 4, 1, 2]
    straight = build().generate(PROMPTS, SEEDS, Sampling(16))
    mixed = build(5).generate([PROMPTS[i] for i in order], [SEEDS[i] for i in order], Sampling(16))
    close(mixed, [straight[i] for i in order])


def test_the_order_of_seeds_is_that_of_the_completions(build):
    straight = build().generate(PROMPTS, SEEDS, Sampling(16))
    turned = build().generate(PROMPTS, [own[::-1] for own in SEEDS], Sampling(16))
    close(turned, [group[::-1] for group in straight])


def test_groups_may_differ_in_size(build):
    uneven = [SEEDS[0][:1], [], SEEDS[2], SEEDS[3][:2], SEEDS[4][:3], SEEDS[5]]
    whole = build().generate(PROMPTS, SEEDS, Sampling(8))
    got = build(3).generate(PROMPTS, uneven, Sampling(8))
    close(got, [group[: len(own)] for group, own in zip(whole, uneven, strict=True)])


def test_a_longer_limit_continues_the_same_completion(build):
    short = build().generate(PROMPTS, SEEDS, Sampling(4))
    long = build().generate(PROMPTS, SEEDS, Sampling(16))
    assert ids(short) == [[c.ids[:4] for c in group] for group in long]


def test_same_seed_twice_gives_the_same(build):
    engine = build()
    first = engine.generate(PROMPTS, SEEDS, Sampling(16))
    assert first == engine.generate(PROMPTS, SEEDS, Sampling(16))
    one, other = engine.generate([PROMPTS[0]], [[5, 5]], Sampling(16))[0]
    close([[one]], [[other]])


def test_other_seeds_give_other_completions(build):
    group = build().generate([PROMPTS[0]], [list(range(20))], Sampling(16))[0]
    assert len({tuple(c.ids) for c in group}) > 15


def test_torchs_random_state_is_neither_read_nor_moved(build):
    torch.manual_seed(1)
    first = build().generate(PROMPTS, SEEDS, Sampling(8))
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    torch.manual_seed(2)
    assert first == build().generate(PROMPTS, SEEDS, Sampling(8))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_token_follows_the_softmax(build, model, temperature):
    draws = 4000
    groups = build(1000).generate([PROMPTS[0]], [list(range(draws))], Sampling(1, temperature))
    counts = np.bincount([c.ids[0] for c in groups[0]], minlength=model.config.vocab_size)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    expected = draws * (logits / temperature).softmax(-1).numpy()
    # Chi-square wants at least 5 expected in a cell: pool the rare ones.
    rare = expected < 5
    seen = np.append(counts[~rare], counts[rare].sum())
    due = np.append(expected[~rare], expected[rare].sum())
    cells = due > 0
    statistic = float(((seen - due)[cells] ** 2 / due[cells]).sum())
    freedom = int(cells.sum()) - 1
    assert freedom >= 8
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_second_token_follows_the_softmax_given_the_first(build, model):
    group = build(1000).generate([PROMPTS[1]], [list(range(4000))], Sampling(2))[0]
    first = int(np.bincount([c.ids[0] for c in group if len(c.ids) == 2]).argmax())
    seconds = [c.ids[1] for c in group if c.ids[0] == first and len(c.ids) == 2]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*PROMPTS[1], first]])).logits[0, -1].double()
    due = len(seconds) * logits.softmax(-1).numpy()
    counts = np.bincount(seconds, minlength=model.config.vocab_size)
    common = due >= 5
    statistic = float(((counts - due)[common] ** 2 / due[common]).sum())
    freedom = int(common.sum())
    assert freedom >= 5
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_the_end_token_is_kept_and_nothing_follows_it(build):
    flat = flatten(build().generate(PROMPTS, SEEDS, Sampling(40)))
    finished = [c for c in flat if EOS in c.ids]
    assert len(finished) > len(flat) // 2
    assert all(c.ids.index(EOS) == len(c.ids) - 1 for c in finished)
    assert all(len(c.logprobs) == len(c.ids) for c in flat)


def test_truncated_says_that_the_end_token_was_not_reached(build):
    flat = flatten(build().generate(PROMPTS, SEEDS, Sampling(12)))
    assert {c.truncated for c in flat} == {True, False}
    for completion in flat:
        assert completion.truncated == (EOS not in completion.ids)
        assert not completion.truncated or len(completion.ids) == 12


def test_an_end_token_at_the_limit_is_no_truncation(build):
    group = build().generate([PROMPTS[0]], [list(range(200))], Sampling(1))[0]
    ended = [c for c in group if c.ids == [EOS]]
    assert ended
    assert not any(c.truncated for c in ended)


def test_padding_tokens_that_are_sampled_do_not_end_a_completion(build):
    flat = build().generate([PROMPTS[0]], [list(range(60))], Sampling(12))[0]
    assert any(PAD in c.ids[:-1] for c in flat)


def rows_seen(model: Any, generate: Callable[[], Any]) -> tuple[Any, list[tuple[int, int]]]:
    """Call ``generate`` and note the shape of every input that the model sees."""
    seen: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        return generate(), seen
    finally:
        hook.remove()


def test_finished_sequences_leave_the_batch(build, model):
    groups, seen = rows_seen(model, lambda: build().generate(PROMPTS, SEEDS, Sampling(16)))
    flat = flatten(groups)
    longest = max(len(c.ids) for c in flat)
    alive = [sum(len(c.ids) > t for c in flat) for t in range(1, longest)]
    # One row per prompt at first, then one per completion that still lacks its end.
    assert seen == [(6, 7), *((rows, 1) for rows in alive)]
    assert alive[-1] < alive[0] < len(flat)


def test_decoding_stops_when_all_have_ended(build, model):
    free = build(eos=-1).generate([PROMPTS[0]], [[0]], Sampling(9, temperature=0.0))[0][0]
    eos = free.ids[2]
    (group,), seen = rows_seen(
        model,
        lambda: build(eos=eos).generate([PROMPTS[0]], [[0, 1]], Sampling(9, temperature=0.0)),
    )
    assert len(seen) == len(group[0].ids) == free.ids.index(eos) + 1


def test_no_more_sequences_at_once_than_allowed(build, model):
    _, seen = rows_seen(model, lambda: build(3).generate(PROMPTS, SEEDS, Sampling(8)))
    assert max(rows for rows, _ in seen) <= 3


def test_no_prompts_give_no_completions(build):
    assert build().generate([], [], Sampling(4)) == []


def test_generation_leaves_no_gradient_and_the_weights_alone(build, model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    build().generate(PROMPTS, SEEDS, Sampling(4))
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_version_is_that_of_the_last_update(build, model, student_folder):
    engine = build()
    assert engine.version is None
    engine.update_weights(ModelWeights(model, student_folder), 3)
    assert engine.version == 3
    engine.update_weights(ModelWeights(model, student_folder), 4)
    assert engine.version == 4


def test_updated_weights_are_sampled_from(build, student_folder, teacher_folder):
    engine, fresh = build(), TransformersEngine()
    other = ModelWeights(load_causal_lm(teacher_folder), teacher_folder)
    before = engine.generate(PROMPTS, SEEDS, Sampling(12))
    engine.update_weights(other, 1)
    fresh.setup(other, EOS, PAD)
    after = engine.generate(PROMPTS, SEEDS, Sampling(12))
    assert ids(after) != ids(before)
    assert after == fresh.generate(PROMPTS, SEEDS, Sampling(12))


@pytest.mark.parametrize("bad", [0, -1, float("nan")])
def test_max_sequences_below_1_is_refused(bad):
    with pytest.raises(ConfigurationError, match=r"`max_sequences` must be at least 1: got "):
        TransformersEngine(bad)
