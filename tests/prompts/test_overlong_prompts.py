"""Prompts over the length limit are refused, or left out and counted, as the setting says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from helpers.short_runs import fit, make_data, make_module
from kdrl_lightning import GRPO, BatchReward, Sample, Verdict
from kdrl_lightning.errors import ConfigurationError

pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")

ROWS = [{"prompt": f"{i}+1=" if i % 4 else f"{i}" * 20 + "="} for i in range(8)]


def run(tmp_path: Path, student: str, **changes: Any) -> Any:
    data = make_data(train_prompts=ROWS, val_prompts=ROWS, **changes)
    trace = fit(tmp_path, make_module(student, None, GRPO()), data, max_steps=2)
    return data, trace


def test_they_are_left_out_and_counted(
    tmp_path: Path, student_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, trace = run(
        tmp_path,
        student_folder,
        overlong_prompts="drop",
        max_prompt_tokens=8,
        prompts_per_rollout=2,
        rollouts_per_epoch=None,
    )
    out = capsys.readouterr().out
    for name in ("train_prompts", "val_prompts"):
        words = f"{name}: 2 of 8 prompts are left out because they have more than 8 tokens\n"
        assert out.count(words) == 1
    assert len(data.rollouts.prompts) == 6
    assert data.rollouts_per_epoch == 3  # one pass of what is left, two prompts a rollout
    lengths = {int(n) for _, batch in trace.seen for n in batch.lengths - batch.completion_lengths}
    assert max(lengths) <= 8


def test_they_refuse_the_run(tmp_path: Path, student_folder: str) -> None:
    words = re.escape(
        "`val_prompts` must have at most 8 tokens a prompt (context 128, `max_tokens` 10): got 21 "
        "in row 0 (above the limit: 2 of 8). Set `overlong_prompts: drop`, or lower `max_tokens`."
    )
    with pytest.raises(ConfigurationError, match=f"^{words}$"):
        run(tmp_path, student_folder, max_prompt_tokens=8)


def test_a_source_of_nothing_else_refuses_the_run(tmp_path: Path, student_folder: str) -> None:
    with pytest.raises(ConfigurationError, match="`val_prompts` must have at most 2 tokens"):
        run(tmp_path, student_folder, overlong_prompts="drop", max_prompt_tokens=2)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"overlong_prompts": "cut"}, "`overlong_prompts` must be refuse or drop: got cut"),
        ({"max_prompt_tokens": 0}, "`max_prompt_tokens` must be at least 1: got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make_data(**setting)


class Moody(BatchReward):
    """Fails on one completion of each batch of several; counts its own starts and ends."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def judge(self, samples: Any) -> list[float | Verdict | Exception]:
        results: list[float | Verdict | Exception] = [
            Verdict(len(s.ids) % 2, False, {"odd": len(s.ids) % 2}) for s in samples
        ]
        return [OSError("no"), *results[1:]] if len(samples) > 2 else results

    def start(self) -> None:
        self.log.append("start")

    def close(self) -> None:
        self.log.append("close")


@pytest.mark.filterwarnings("ignore:the reward failed on .* of a rollout:UserWarning")
def test_a_failing_reward_in_a_run(tmp_path: Path, student_folder: str) -> None:
    reward = Moody()
    data = make_data(reward=reward, val_prompts=None, failed_reward=-3.0)
    trace = fit(tmp_path, make_module(student_folder, None, GRPO()), data, max_steps=4)
    first, second = (batch for _, batch in trace.seen if batch.metrics)
    assert [b.metrics["reward/failures"] for b in (first, second)] == [1.0, 1.0]
    whole = [batch.rewards.tolist() for _, batch in trace.seen[:2]]
    assert sum(rewards.count(-3.0) for rewards in whole) == 1
    others = [value for rewards in whole for value in rewards if value != -3.0]
    # The mean of a part is over the completions that have it.
    assert first.metrics["reward/odd_mean"] == pytest.approx(sum(others) / 15)
    assert reward.log == ["start", "close"]
    # A run that was stopped after its rewards leaves no failures to the next.
    data.rollouts.live.rewards([Sample("", [0], {})] * 3)
    again = fit(tmp_path, make_module(student_folder, None, GRPO()), data, max_steps=2)
    assert [b.metrics["reward/failures"] for _, b in again.seen if b.metrics] == [1.0]


def test_a_reward_that_fails_in_setup_stops_the_run(tmp_path: Path, student_folder: str) -> None:
    def picky(sample: Sample) -> float:
        return 1.0 / (sample.row.get("source") != "b")

    rows = [{"prompt": "1+1=", "source": name} for name in "aaab"]
    data = make_data(train_prompts=rows, val_prompts=None, reward=picky)
    with pytest.raises(ConfigurationError, match=r"got ZeroDivisionError.* for the completion ''"):
        fit(tmp_path, make_module(student_folder, None, GRPO()), data)
