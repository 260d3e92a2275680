"""A reward's changes to the training process are undone; its random state is separate."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kdrl_lightning.rewards import RewardRunner, Sample, TaskReward
from kdrl_lightning.rewards.processes.surroundings import ALL

ONE = [Sample("42", [], {"prompt": "6*7="})]
CHANGES: dict[str, Callable[[], Any]] = {
    "torch's default dtype": lambda: torch.set_default_dtype(torch.float64),
    "torch's default device": lambda: torch.set_default_device("meta"),
    "torch's gradient mode": lambda: torch.set_grad_enabled(False),
    "torch's deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
    "torch's number of threads": lambda: torch.set_num_threads(3),
    "torch's precision of float32 products": lambda: torch.set_float32_matmul_precision("medium"),
    "the handlers of signals": lambda: signal.signal(signal.SIGTERM, lambda *_: None),
}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = [setting.read() for setting in ALL]
    torch.set_num_threads(1)
    yield
    for setting, value in zip(ALL, before, strict=True):
        setting.write(value)


def after(change: Callable[[], Any], fails: bool = False) -> RewardRunner:
    """Return a runner of a reward that makes a change."""

    def reward(_: Sample) -> float:
        change()
        if fails:
            raise ValueError("no")
        return 1.0

    return RewardRunner(reward)


def test_every_setting_is_tried() -> None:
    assert [setting.name for setting in ALL] == list(CHANGES)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.filterwarnings("ignore:the reward failed:UserWarning")
def test_a_change_is_undone_and_named_once(name: str, fails: bool) -> None:
    before = [setting.read() for setting in ALL]
    runner = after(CHANGES[name], fails)
    with pytest.warns(
        UserWarning, match=f"the reward changed {name}.*it is restored after each call"
    ):
        runner(ONE, training=not fails)
    assert [setting.read() for setting in ALL] == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="the reward failed")
        runner(ONE, training=not fails)
    assert [setting.read() for setting in ALL] == before


@pytest.mark.parametrize("where", ["start", "check"])
def test_checks_and_starts_change_nothing_either(where: str) -> None:
    class Loads(TaskReward):
        def __call__(self, sample: Sample) -> float:
            return 1.0

        def start(self) -> None:
            torch.set_default_dtype(torch.bfloat16)

        def check(self, row: Any) -> None:
            torch.set_default_dtype(torch.bfloat16)

    runner = RewardRunner(Loads())
    with pytest.warns(UserWarning, match="from torch.float32 to torch.bfloat16"):
        runner.start() if where == "start" else runner.check([{"prompt": "1"}])
    assert torch.get_default_dtype() == torch.float32


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def seed() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)


@pytest.mark.parametrize("used", [draw, seed])
def test_the_runs_random_numbers_do_not_depend_on_the_reward(used: Callable[[], Any]) -> None:
    seed()
    expected = [draw() for _ in range(3)]
    seed()
    runner, found = after(used), []
    for _ in range(3):
        found.append(draw())
        runner(ONE)
    assert found == expected


def test_a_rewards_random_numbers_go_on_whatever_the_run_draws() -> None:
    drawn: list[Any] = []
    seed()
    expected = [draw() for _ in range(3)]
    seed()
    runner = after(lambda: drawn.append(draw()))
    for _ in range(3):
        runner(ONE)
        seed()
    assert drawn == expected


def test_the_processes_of_a_reward_need_no_torch() -> None:
    code = (
        "import sys, kdrl_lightning.rewards, kdrl_lightning.cli.settings.user_code; "
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "False\n"
