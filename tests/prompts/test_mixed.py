"""Mixtures: shares, order, and the same prompts over ranks and after a resume."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.short_runs import Trace, make_data, make_module, make_slots, make_trainer
from kdrl_lightning import GRPO, MixedPrompts
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.prompts.base import first_of_each_kind
from kdrl_lightning.rollout.loader import rows_at


def source(name: str, size: int) -> list[dict[str, str]]:
    return [{"prompt": f"{name}{i}"} for i in range(size)]


def texts(mixture: MixedPrompts) -> list[str]:
    return [mixture[i]["prompt"] for i in range(len(mixture))]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.floats(0.05, 20.0)), min_size=1, max_size=9),
    st.integers(1, 80),
    st.integers(0, 5),
)
def test_every_beginning_has_the_shares(
    parts: list[tuple[int, float]], size: int, seed: int
) -> None:
    sources = {str(i): source(str(i), n) for i, (n, _) in enumerate(parts)}
    weights = {str(i): weight for i, (_, weight) in enumerate(parts)}
    mixture = MixedPrompts(sources, weights, size, seed)
    total = sum(weights.values())
    taken: Counter[str] = Counter()
    for i in range(size):
        taken[mixture[i]["source"]] += 1
        for name, weight in weights.items():
            assert abs(taken[name] - (i + 1) * weight / total) <= 1.0 + 1e-9
    # A source's rows are all taken before one is taken again.
    for name, rows in sources.items():
        own = [row["prompt"] for row in (mixture[i] for i in range(size)) if row["source"] == name]
        for start in range(0, len(own), len(rows)):
            assert len(set(own[start : start + len(rows)])) == len(own[start : start + len(rows)])


def test_the_order_follows_from_the_seed_alone() -> None:
    sources = {"a": source("a", 7), "b": source("b", 5)}
    first = texts(MixedPrompts(sources, {"a": 2, "b": 1}, 40, seed=3))
    assert texts(MixedPrompts(sources, {"a": 4, "b": 2}, 40, seed=3)) == first
    assert texts(MixedPrompts(sources, {"a": 2, "b": 1}, 20, seed=3)) == first[:20]
    assert texts(MixedPrompts(sources, {"a": 2, "b": 1}, 40, seed=4)) != first


def test_without_weights_each_row_is_there_once() -> None:
    sources = {"a": source("a", 7), "b": source("b", 2)}
    mixture = texts(MixedPrompts(sources))
    assert sorted(mixture) == sorted(row["prompt"] for rows in sources.values() for row in rows)


def test_without_a_size_no_row_is_taken_twice() -> None:
    mixture = texts(MixedPrompts({"a": source("a", 10), "b": source("b", 10)}, {"a": 3, "b": 1}))
    assert len(mixture) == len(set(mixture)) == 13  # ten of a, three of b


def test_a_reward_is_tried_on_a_row_of_each_source() -> None:
    mixture = MixedPrompts({"a": source("a", 3), "b": source("b", 3)})
    kinds = first_of_each_kind(mixture[i] for i in range(len(mixture)))
    assert sorted(row["source"] for row in kinds) == ["a", "b"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no source": ({"sources": {}}, r"`sources` must be sources with at least one row each: got \{"),
    "no row": ({"sources": {"a": []}}, r"`sources` must be .* one row each: got \{'a': 0\}\."),
    "missing": (
        {"weights": {"a": 1}},
        r"`weights` must have .* `sources`, a, b: got a\.",
    ),
    "none": ({"weights": {}}, r"`weights` must have the names of `sources`, a, b: got none\."),
    "unknown": ({"weights": {"a": 1, "c": 1}}, r"`weights` must have .*: got a, c\."),
    "zero": ({"weights": {"a": 1, "b": 0}}, r"`weights` must be above 0 and finite: got 0 for b\."),
    "nan": ({"weights": {"a": 1, "b": float("nan")}}, r"`weights` must be above 0 .*: got nan for"),
    "size": ({"size": 0}, r"`size` must be at least 1: got 0\."),
    "seed": ({"seed": -1}, r"`seed` must be at least 0: got -1\."),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused(case: str) -> None:
    arguments, words = BAD[case]
    with pytest.raises(ConfigurationError, match=rf"^{words}"):
        MixedPrompts(**{"sources": {"a": source("a", 3), "b": source("b", 3)}, **arguments})


def mixture_of_sums() -> MixedPrompts:
    sources = {
        "low": [{"prompt": f"{i}+1="} for i in range(10)],
        "high": [{"prompt": f"{i}+99="} for i in range(10)],
    }
    return MixedPrompts(sources, {"low": 3.0, "high": 1.0}, size=37, seed=5)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_prompts_of_one_process(ranks: int) -> None:
    slots, mixture = make_slots(8, 2, 1, seed=9), mixture_of_sums()

    def prompts(rank: int, world: int) -> list[str]:
        own = slots.of_rank(rank, world)
        places = [slots.position(r, s, 0) for r in range(12) for s in own]
        return [mixture[row]["prompt"] for row in rows_at(places, len(mixture), 9)]

    shared = [prompt for rank in range(ranks) for prompt in prompts(rank, ranks)]
    assert sorted(shared) == sorted(prompts(0, 1))
    assert len(set(shared)) == len({mixture[i]["prompt"] for i in range(37)})


@pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")
@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
def test_a_resumed_run_goes_on_with_the_same_prompts(tmp_path: Path, student_folder: str) -> None:
    def run(steps: int, ckpt_path: Path | None = None) -> tuple[Any, list[tuple[int, Any]]]:
        data = make_data(train_prompts=mixture_of_sums(), val_prompts=None)
        trace = Trace()
        trainer = make_trainer(tmp_path, callbacks=[trace], max_steps=steps)
        module = make_module(student_folder, None, GRPO())
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return trainer, [(step, batch.input_ids.tolist()) for step, batch in trace.seen]

    _, whole = run(8)
    stopped, before = run(3)  # in the middle of the second rollout
    stopped.save_checkpoint(tmp_path / "last.ckpt")
    _, after = run(8, tmp_path / "last.ckpt")
    assert before + after == whole
