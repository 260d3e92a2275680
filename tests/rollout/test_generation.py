"""Completions are matched with rows, texts and verdicts; seeds are mixed from a key."""

from __future__ import annotations

import pytest

from kdrl_lightning.engines.base import Completion, RolloutEngine, Sampling, noise_seed
from kdrl_lightning.errors import TrainingStopped
from kdrl_lightning.rewards import RewardRunner, Sample
from kdrl_lightning.rollout.generation import sample_and_judge
from kdrl_lightning.tiny.models import make_tokenizer


class Echo(RolloutEngine):
    """Answers each seed with the prompt's first token, then the seed's digit, then the end."""

    def setup(self, weights, eos_token_id, pad_token_id):
        raise AssertionError

    def update_weights(self, weights, version):
        raise AssertionError

    def generate(self, prompts, seeds, sampling):
        assert sampling == Sampling(3, 0.5)
        return [
            [Completion([p[0], 2 + s, 1], [-0.1] * 3, truncated=s > 5) for s in own]
            for p, own in zip(prompts, seeds, strict=True)
        ]


def test_each_completion_meets_its_own_row():
    seen: list[Sample] = []

    def reward(sample: Sample) -> float:
        seen.append(sample)
        return float(sample.text == sample.row["answer"])

    rows = [({"answer": "12"}, [3, 12]), ({"answer": "77"}, [9])]
    judged = sample_and_judge(
        Echo(), make_tokenizer(), RewardRunner(reward), rows, [[2, 3], [6, 7]], Sampling(3, 0.5)
    )
    assert [j.text for j in judged] == ["12", "13", "76", "77"]
    assert [j.verdict.correct for j in judged] == [True, False, False, True]
    assert [j.row for j in judged] == [rows[0][0]] * 2 + [rows[1][0]] * 2
    assert [j.prompt_ids for j in judged] == [[3, 12]] * 2 + [[9]] * 2
    assert [j.completion.ids for j in judged] == [[3, 4, 1], [3, 5, 1], [9, 8, 1], [9, 9, 1]]
    assert [s.truncated for s in seen] == [False, False, True, True]
    assert [s.ids for s in seen] == [j.completion.ids for j in judged]


def test_a_failing_reward_stops_training_but_not_an_evaluation():
    def broken(sample: Sample) -> float:
        raise ZeroDivisionError

    def judge(**kwargs: bool) -> list[float]:
        rewards, sampling = RewardRunner(broken), Sampling(3, 0.5)
        judged = sample_and_judge(
            Echo(), make_tokenizer(), rewards, [({}, [3])], [[2, 3]], sampling, **kwargs
        )
        return [j.verdict.reward for j in judged]

    with pytest.raises(TrainingStopped, match="2 of 2 completions"):
        judge()
    with pytest.warns(UserWarning, match="2 of 2 completions of an evaluation"):
        assert judge(training=False) == [0.0, 0.0]


def test_no_prompts_ask_no_engine():
    assert sample_and_judge(None, None, None, [], [], Sampling(1)) == []  # type: ignore[arg-type]


def test_noise_seeds_follow_the_whole_key():
    keys = [(a, b, c) for a in range(8) for b in range(8) for c in range(8)]
    seeds = [noise_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert seeds == [noise_seed(*key) for key in keys]
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_negative_key_is_refused():
    with pytest.raises(ValueError, match="non-negative"):
        noise_seed(0, -1)
