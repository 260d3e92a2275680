"""A prompt that completions share is run once; scores, gradients and samples stay the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kdrl_lightning.models.scorer as scoring
from helpers import scored_models
from helpers.reference import close
from kdrl_lightning.losses import reverse_kl
from kdrl_lightning.models.passes.shared_prompts import TIMED, Sharing, merge_rows
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import recompute_layers
from kdrl_lightning.rollout_batch import RolloutBatch, collate


def rollout(prompt_lengths: tuple[int, int] = (9, 12)) -> RolloutBatch:
    """Two prompts, seven completions of different length, the last two equal."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(2, scored_models.VOCAB, (count,), generator=generator).tolist()

    first, second = (draw(n) for n in prompt_lengths)
    completions = [draw(n) for n in (5, 3, 6, 1, 4, 6)]
    return collate(
        [first] * 3 + [second] * 4,
        [*completions, completions[-1]],
        [0] * 3 + [1] * 4,
        pad_id=scored_models.PAD,
    ).replace(temperature=0.7)


def gradients(scorer: Scorer, batch: RolloutBatch) -> tuple[Any, dict[str, torch.Tensor]]:
    scorer.model.zero_grad()
    scores = scorer.score(batch)
    (scores.logprobs.sin().sum() + scores.entropy.cos().sum()).backward()
    found = {name: p.grad.clone() for name, p in scorer.model.named_parameters()}
    return scores.map(torch.Tensor.detach), found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("prompts", [(9, 12), (10, 10)])
@pytest.mark.parametrize("name", scored_models.ARCHITECTURES)
def test_shared_prompts_change_nothing(
    name: str, prompts: tuple[int, int], recompute: bool
) -> None:
    model, batch = scored_models.build(name, dtype=torch.float64), rollout(prompts)
    if recompute:
        recompute_layers(model)
    scorer = Scorer(model)
    plain, expected = gradients(scorer, batch)
    tokens = count_tokens(scorer)
    scorer.shares = True
    shared, found = gradients(scorer, batch)
    # 2 prompts and 6 different completions, without their last token; else 7 whole rows.
    passes = 2 if recompute else 1
    assert tokens == [2 * max(prompts)] * 1 + [6 * 5] + [6 * 5, 2 * max(prompts)] * (passes - 1)
    close(shared.logprobs, plain.logprobs)
    close(shared.entropy, plain.entropy)
    # Norms cast gradients to float32 whatever the model's type; Phi's do not.
    bounds = 1e-10 if name == "PhiForCausalLM" else 1e-4
    for key, gradient in expected.items():
        gap = (found[key] - gradient).norm() / gradient.norm().clamp(min=1.0)
        assert gap < bounds, key


def test_equal_rows_that_are_asked_different_things_stay_apart() -> None:
    scorer, batch = Scorer(scored_models.build("LlamaForCausalLM", dtype=torch.float64)), rollout()
    shape, draw = (*batch.completion_ids.shape, 3), torch.Generator().manual_seed(1)
    asked = torch.randint(0, scored_models.VOCAB, shape, generator=draw)
    plain = scorer.score(batch, topk_ids=asked)
    scorer.shares = True
    shared = scorer.score(batch, topk_ids=asked)
    for ours, theirs in zip(shared, plain, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            close(ours, theirs)
    assert shared.topk_logprobs is not None
    assert (shared.topk_logprobs[-1] - shared.topk_logprobs[-2]).abs().max() > 0.01


@pytest.mark.parametrize("teacher_shares", [False, True])
def test_another_models_states_go_with_their_rows(teacher_shares: bool) -> None:
    scorer, teacher = (
        Scorer(scored_models.build(name, dtype=torch.float64))
        for name in ("LlamaForCausalLM", "Qwen2ForCausalLM")
    )
    batch = rollout()

    def run() -> tuple[Any, dict[str, torch.Tensor]]:
        scorer.model.zero_grad()
        found = scorer.score(batch, other=teacher.states(batch), divergence=reverse_kl)
        (found.divergence.sin().sum() + found.logprobs.cos().sum()).backward()
        named = scorer.model.named_parameters()
        return found.map(torch.Tensor.detach), {n: p.grad.clone() for n, p in named}

    plain, expected = run()
    scorer.shares, teacher.shares = True, teacher_shares
    shared, found = run()
    assert plain.divergence is not None and (plain.divergence > 1e-3).any()
    close(shared.divergence, plain.divergence)
    close(shared.logprobs, plain.logprobs)
    for key, gradient in expected.items():
        assert (found[key] - gradient).norm() / gradient.norm().clamp(min=1.0) < 1e-4, key


def test_equal_rows_are_scored_once_where_nothing_tells_them_apart() -> None:
    scorer, batch = Scorer(scored_models.build("LlamaForCausalLM")), rollout()
    scorer.shares = True
    tokens, other = int(batch.completion_mask.sum()), scorer.states(batch)
    assert head_rows(scorer, batch) == [tokens - 6]  # without the last row
    # The update's rows are those of the old scores, which are to be equal bit for bit.
    assert head_rows(scorer, batch, other=other, divergence=reverse_kl) == [tokens - 6]
    asked = batch.completion_ids[..., None]
    assert head_rows(scorer, batch, topk_ids=asked) == [tokens]


def head_rows(scorer: Scorer, batch: RolloutBatch, **call: Any) -> list[int]:
    """Tokens that the head is applied to."""
    rows: list[int] = []
    scored = scoring.token_scores

    def note(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(hidden))
        return scored(hidden, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "token_scores", note)
        scorer.score(batch, **call)
    return rows


def count_tokens(scorer: Scorer) -> list[int]:
    """Tokens of each pass through the first layer's attention, from now on."""
    seen: list[int] = []
    layer = next(m for m in scorer.model.modules() if type(m).__name__.endswith("Attention"))

    def note(_: Any, args: Any, kwargs: Any) -> None:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        seen.append(hidden.shape[0] * hidden.shape[1])

    layer.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def test_prompts_of_one_completion_are_not_worth_two_passes() -> None:
    scorer = Scorer(scored_models.build("LlamaForCausalLM"))
    scorer.verify("it")
    assert scorer.shares
    tokens = count_tokens(scorer)
    scorer.score(rollout().select([0, 3]))
    assert tokens == [2 * 14]
    scorer.score(rollout().select([5, 6]))
    assert tokens[1:] == [1 * 18]  # equal rows are one all the same


def test_an_architecture_without_such_a_cache_is_left_alone() -> None:
    model = scored_models.build("LlamaForCausalLM")
    decoder, forward = model.get_decoder(), model.get_decoder().forward

    def refuse(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            raise TypeError("no cache of that kind")
        return forward(*args, **kwargs)

    decoder.forward = refuse
    scorer = Scorer(model)
    scorer.verify("it")
    assert not scorer.shares
    assert scorer.score(rollout()).logprobs.isfinite().all()


def test_one_that_ignores_the_cache_is_left_alone() -> None:
    model = scored_models.build("LlamaForCausalLM")
    decoder, forward = model.get_decoder(), model.get_decoder().forward

    def ignore(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None and past_key_values.get_seq_length():
            past_key_values = None
        return forward(*args, past_key_values=past_key_values, **kwargs)

    decoder.forward = ignore
    scorer = Scorer(model)
    scorer.verify("it")
    assert not scorer.shares


def test_float64_is_left_alone() -> None:
    scorer = Scorer(scored_models.build("LlamaForCausalLM", dtype=torch.float64))
    scorer.verify("it")
    assert not scorer.shares


def test_rows_that_differ_in_length_or_prompt_alone_are_different() -> None:
    ids = torch.tensor([[5, 6, 7, 0]] * 5)
    mask = torch.tensor([[1, 1], [1, 0], [1, 0], [1, 0], [1, 1]]).bool()
    rows = merge_rows(ids, torch.tensor([2, 2, 1, 2, 1]), mask)
    assert rows.of.tolist() == [3, 2, 0, 2, 1]
    assert rows.prompt_lengths.tolist() == [1, 1, 2, 2]
    assert rows.mask.sum(1).tolist() == [1, 2, 1, 2]
    assert rows.prompts.tolist() == [[5, -1], [5, 6]]
    assert rows.prompt_of.tolist() == [0, 0, 1, 1]


def timed(shared: float, whole: float, tokens: tuple[int, int], clock: bool = True) -> list[bool]:
    """Decide on micro-batches of so many tokens, with a clock that shows seconds per token."""
    ran = []

    def seconds(work: Any) -> float:
        work()
        first = len(ran) <= 2  # starting the kernels takes long, and says nothing
        return 100.0 * len(ran) if first else ran[-1]

    sharing = Sharing(seconds if clock else None)
    said = [
        sharing.pays(
            *tokens,
            lambda: ran.append(shared * tokens[0]),
            lambda: ran.append(whole * tokens[1]),
        )
        for _ in range(TIMED + 2)
    ]
    assert len(ran) == (2 * TIMED if clock and tokens[0] < tokens[1] else 0)
    return said


def test_seconds_decide_where_there_is_a_clock_and_tokens_elsewhere() -> None:
    # Half the tokens: shared, unless a token of the two passes takes more than twice as long.
    assert timed(1.9, 1.0, (50, 100))[TIMED:] == [True, True]
    assert timed(2.1, 1.0, (50, 100))[TIMED:] == [False, False]
    assert timed(0.5, 1.0, (90, 100))[TIMED:] == [True, True]
    assert all(timed(2.1, 1.0, (50, 100), clock=False))
    assert not any(timed(0.5, 1.0, (90, 100), clock=False))
    assert not any(timed(0.5, 1.0, (100, 100)))  # nothing to time: nothing is saved


def test_a_scorer_takes_the_way_that_its_clock_prefers() -> None:
    scorer, batch = Scorer(scored_models.build("LlamaForCausalLM")), rollout((40, 40))
    scorer.shares = True
    plain = scorer.score(batch).logprobs
    ways: list[str] = []

    def seconds(work: Any) -> float:
        assert not torch.is_grad_enabled()
        work()
        ways.append(work.func.__name__)
        return 9.0 if ways[-1] == "shared_states" else 1.0

    scorer.sharing = Sharing(seconds)
    tokens = count_tokens(scorer)
    for _ in range(TIMED):
        scorer.score(batch)
    assert ways == ["shared_states", "_row_states"] * TIMED
    tokens.clear()
    found = scorer.score(batch).logprobs
    assert tokens == [6 * 46]  # whole rows, in one pass
    close(found, plain, 1e-5)  # float32
