"""Adaptive entropy control: its rule, refused settings, a run, and a resume at each step."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.reference import close
from helpers.short_runs import make_data, make_module, make_trainer
from kdrl_lightning import GRPO
from kdrl_lightning.callbacks import AdaptiveEntropy, CoefficientSchedule
from kdrl_lightning.callbacks.schedules import Constant
from kdrl_lightning.errors import ConfigurationError

pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")


@given(st.lists(st.floats(0.0, 1.0), max_size=30), st.floats(0.1, 0.9))
def test_the_coefficient_follows_skywork_or1_within_its_bounds(
    entropies: list[float], target: float
) -> None:
    control = AdaptiveEntropy(target, step=0.01, lowest=0.0, highest=0.05, start=0.02)
    got = expected = 0.02
    for entropy in entropies:
        sign = (entropy < target) - (entropy > target)
        expected = max(0.0, min(0.05, expected + 0.01 * sign))
        got = control.after(got, entropy)
        close(got, expected)
        assert control.weight(got, entropy) == (got if entropy <= target else 0.0)


def test_a_loop_with_an_entropy_that_answers_stays_near_the_target() -> None:
    """The entropy falls by 5 % a rollout and rises with the bonus."""
    control, entropy, coefficient = AdaptiveEntropy(0.2), 1.0, 0.0
    seen = []
    for _ in range(400):
        weight = control.weight(coefficient, entropy)
        entropy = 0.95 * entropy + 0.5 * weight
        coefficient = control.after(coefficient, entropy)
        seen.append(entropy)
    assert max(abs(x - 0.2) for x in seen[200:]) < 0.06
    assert 0.95**400 < 1e-8  # without it the entropy is gone


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target": -0.1}, r"`target` must be at least 0: got -0\.1\."),
        ({"step": 0.0}, r"`step` must be above 0 and finite: got 0\.0\."),
        ({"step": math.inf}, r"`step` must be above 0 and finite: got inf\."),
        ({"lowest": -1.0}, r"`lowest` must be at least 0: got -1\.0\."),
        ({"lowest": 0.2}, r"`highest` must be at least 0\.2: got 0\.1\. It must not be below low"),
        ({"start": 0.5}, r"`start` must be in \[0, 0\.1\]: got 0\.5\."),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        AdaptiveEntropy(**values)


@pytest.mark.parametrize(
    "rival", [AdaptiveEntropy(), CoefficientSchedule("entropy_coef", Constant(0.1))]
)
def test_one_callback_sets_the_coefficient(rival: pl.Callback) -> None:
    control = AdaptiveEntropy()
    module: Any = SimpleNamespace(objective=GRPO(entropy_coef=0.3))
    trainer: Any = SimpleNamespace(callbacks=[control, rival])
    words = f"one that sets entropy_coef: got AdaptiveEntropy and {type(rival).__name__}"
    with pytest.raises(ConfigurationError, match=words):
        control.setup(trainer, module, "fit")
    control.setup(trainer, module, "validate")
    trainer.callbacks = [control, CoefficientSchedule("rl_coef", Constant(0.1))]
    control.setup(trainer, module, "fit")
    control.on_train_start(trainer, module)
    assert module.objective.entropy_coef == 0.0
    control.teardown(trainer, module, "fit")
    assert module.objective.entropy_coef == 0.3


class Seen(pl.Callback):
    """Keeps each update's coefficient, and the entropy of its loss tokens."""

    def __init__(self) -> None:
        self.coefficients: list[float] = []
        self.entropies: list[tuple[float, int]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, i: int) -> None:
        self.coefficients.append(pl_module.objective.entropy_coef)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, i: int
    ) -> None:
        values = outputs["entropy"][batch.loss_mask].double()
        self.entropies.append((float(values.sum()), len(values)))


def run(
    tmp_path: Path, student: str, target: float, steps: int = 8, resume: str | None = None
) -> tuple[Seen, AdaptiveEntropy, pl.Trainer]:
    seen, control = Seen(), AdaptiveEntropy(target, step=0.01, highest=0.02)
    trainer = make_trainer(
        tmp_path, max_steps=steps, callbacks=[control, seen], accumulate_grad_batches=2
    )
    data = make_data(val_prompts=None, minibatches_per_rollout=2)
    trainer.fit(make_module(student, None, GRPO()), datamodule=data, ckpt_path=resume)
    return seen, control, trainer


def test_each_rollout_has_the_coefficient_of_the_entropy_before(
    tmp_path: Path, student_folder: str
) -> None:
    probe = run(tmp_path, student_folder, 0.0, 2)[0]
    mean = sum(s for s, _ in probe.entropies) / sum(n for _, n in probe.entropies)
    high = run(tmp_path, student_folder, mean + 1.0)[0]  # the entropy is always too small
    assert high.coefficients == [0.0] * 4 + [0.01] * 4 + [0.02] * 8  # 4 micro-batches a rollout
    low, control, trainer = run(tmp_path, student_folder, mean / 2)  # always too large
    assert low.coefficients == [0.0] * 16
    values, tokens = (sum(x[i] for x in low.entropies[-4:]) for i in (0, 1))
    assert control.entropy == pytest.approx(values / tokens, rel=1e-6)
    assert trainer.callback_metrics["policy/entropy_coef"] == 0.0


@pytest.mark.parametrize("steps", [2, 3])
def test_a_resumed_run_goes_on_with_the_same_coefficients(
    tmp_path: Path, student_folder: str, steps: int
) -> None:
    """Also in the middle of a rollout, whose first half has been measured."""
    whole, end, _ = run(tmp_path, student_folder, 100.0, 4)
    _, _, trainer = run(tmp_path, student_folder, 100.0, steps)
    file = str(tmp_path / "half.ckpt")
    trainer.save_checkpoint(file)
    rest, again, _ = run(tmp_path, student_folder, 100.0, 4, file)
    assert rest.coefficients == whole.coefficients[2 * steps :]
    assert again.state_dict() == end.state_dict()
    assert torch.load(file, weights_only=True)["callbacks"]["AdaptiveEntropy"]["sums"][1] == (
        0.0 if steps == 2 else sum(n for _, n in whole.entropies[4:6])
    )
