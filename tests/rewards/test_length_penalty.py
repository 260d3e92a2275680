"""DAPO's soft penalty for completions near the token limit."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from helpers.reference import close
from helpers.short_runs import fit, make_data, make_module
from kdrl_lightning import GRPO, LengthPenalty, WeightedRewards
from kdrl_lightning.cli.main import KDRLCLI
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rewards import Reward, Sample, Verdict


def penalised(reward: Reward, limit: int, buffer: int) -> WeightedRewards:
    return WeightedRewards({"task": reward, "length": LengthPenalty(limit, buffer)})


def judged(reward: Reward, length: int) -> Verdict:
    return Verdict.of(reward(Sample("", [7] * length, {})))


def test_the_penalty_by_hand() -> None:
    # Free up to 15 tokens, then a fifth more for each, -1 at 20 and beyond.
    reward = LengthPenalty(max_tokens=20, buffer_tokens=5)
    lengths = (0, 1, 15, 16, 17, 18, 19, 20, 25)
    expected = [0.0, 0.0, 0.0, -0.2, -0.4, -0.6, -0.8, -1.0, -1.0]
    close([judged(reward, n).reward for n in lengths], expected)


@given(st.integers(1, 50), st.data())
def test_it_falls_from_none_to_one(limit: int, data: st.DataObject) -> None:
    buffer = data.draw(st.integers(1, limit))
    reward = LengthPenalty(limit, buffer)
    values = [judged(reward, n).reward for n in range(limit + 3)]
    assert values[: limit - buffer + 1] == [0.0] * (limit - buffer + 1)
    assert values[limit:] == [-1.0] * 3
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("correct", [True, False])
def test_the_verdict_is_the_tasks(correct: bool) -> None:
    reward = penalised(lambda sample: Verdict(0.3, correct), 4, 2)
    assert judged(reward, 2) == Verdict(0.3, correct, {"task": 0.3, "length": 0.0})
    assert judged(reward, 4) == Verdict(0.3 - 1.0, correct, {"task": 0.3, "length": -1.0})
    # A plain number is its own verdict, before the penalty.
    assert judged(penalised(lambda sample: 1.0, 4, 2), 4).correct
    assert not judged(penalised(lambda sample: 0.9, 4, 2), 1).correct


@pytest.mark.parametrize(
    ("limit", "buffer", "message"),
    [
        (0, 1, r"`max_tokens` must be at least 1: got 0\."),
        (8, 0, r"`buffer_tokens` must be from 1 to max_tokens 8: got 0\. DAPO uses a fifth"),
        (8, 9, r"`buffer_tokens` must be from 1 to max_tokens 8: got 9\."),
    ],
)
def test_what_cannot_be_is_refused(limit: int, buffer: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LengthPenalty(limit, buffer)


@pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")
def test_in_a_run(tmp_path: Path, student_folder: str) -> None:
    data = make_data(reward=penalised(lambda sample: 1.0, 10, 4), minibatches_per_rollout=1)
    trace = fit(tmp_path, make_module(student_folder, None, GRPO()), data, max_steps=1)
    batch = trace.seen[0][1]
    lengths = batch.completion_lengths
    expected = 1.0 - ((lengths - 6) / 4).clamp(0.0, 1.0)
    close(batch.rewards, expected, 1e-6)
    assert batch.correct.all() and len(set(expected.tolist())) > 1
    assert batch.metrics["reward/task_mean"] == 1.0
    close(batch.metrics["reward/length_mean"], float(expected.double().mean()) - 1.0, 1e-6)


def test_another_limit_than_the_datas_is_refused(tmp_path: Path, student_folder: str) -> None:
    reward = penalised(lambda sample: 1.0, 12, 4)
    with pytest.raises(ConfigurationError, match=r"`max_tokens` of the reward .* 10: got 12\."):
        fit(tmp_path, make_module(student_folder, None, GRPO()), make_data(reward=reward))


def test_from_a_configuration(tmp_path: Path, student_folder: str) -> None:
    length = {"class_path": "LengthPenalty", "init_args": {"max_tokens": 24, "buffer_tokens": 4}}
    rewards = {"answer": {"class_path": "ExactMatch"}, "length": length}
    reward = {"class_path": "WeightedRewards", "init_args": {"rewards": rewards}}
    config = {
        "model": {"student": student_folder, "objective": {"class_path": "GRPO"}},
        "data": {"train_prompts": [{"prompt": "1+2="}], "reward": reward, "max_tokens": 24},
        "trainer": {"accelerator": "cpu", "logger": False, "max_steps": 1},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    cli = KDRLCLI.run(["--config", str(file)], instantiate_only=True)
    both = cli.datamodule.rewards.reward
    assert isinstance(both, WeightedRewards) and both.correct == "answer"
    assert [type(r).__name__ for r in both.children()] == ["ExactMatch", "LengthPenalty"]
    assert both.rewards["length"].buffer_tokens == 4
