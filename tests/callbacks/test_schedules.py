"""Schedules as functions, refused settings, and when a run sets which coefficient."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.trainer.states import TrainerFn

from helpers.reference import close
from helpers.short_runs import fit, make_data, make_module, make_trainer
from kdrl_lightning import GRPO, KDRL, RLAD
from kdrl_lightning.callbacks import (
    CoefficientSchedule,
    KLCoefficientAnnealing,
    SelectiveImitationStats,
)
from kdrl_lightning.callbacks.schedules import (
    Constant,
    Cosine,
    Linear,
    LinearWithFloor,
    PlateauSwitch,
    Schedule,
    Switch,
)
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.objectives import Objective

pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")

VALUE = st.floats(0.0, 100.0)
STEP = st.integers(0, 300)


@given(VALUE, STEP)
def test_constant(value: float, step: int) -> None:
    assert Constant(value).coef_at(step) == value
    assert Constant(value).extremes() == (value, value)


@given(st.sampled_from([Linear, Cosine]), VALUE, VALUE, st.integers(0, 99), st.integers(1, 99))
def test_spans_are_monotone_between_exact_ends(
    kind: Any, start: float, end: float, begin: int, width: int
) -> None:
    schedule = kind(start, end, end_step=begin + width, begin_step=begin)
    values = [schedule.coef_at(step) for step in range(begin + width + 3)]
    assert values[: begin + 1] == [start] * (begin + 1)
    assert values[begin + width :] == [end] * 3
    assert schedule.extremes() == (min(start, end), max(start, end))
    slack = 1e-12 * max(start, end)
    for a, b in itertools.pairwise(values):
        assert a <= b + slack if start <= end else a >= b - slack
        assert min(start, end) - slack <= a <= max(start, end) + slack
    mirrored = kind(end, start, end_step=begin + width, begin_step=begin)
    for step in range(begin, begin + width + 1):
        close(schedule.coef_at(step), mirrored.coef_at(2 * begin + width - step), 1e-9)


@given(VALUE, VALUE, st.integers(1, 50))
def test_line_and_cosine_meet_in_the_middle(start: float, end: float, half: int) -> None:
    for kind in (Linear, Cosine):
        close(kind(start, end, end_step=2 * half).coef_at(half), (start + end) / 2, 1e-9)


def test_a_line_and_a_cosine_by_hand() -> None:
    line, wave = Linear(2.0, 1.0, end_step=14, begin_step=10), Cosine(2.0, 1.0, 14, 10)
    close([line.coef_at(s) for s in (9, 10, 11, 12, 13, 14, 15)], [2, 2, 1.75, 1.5, 1.25, 1, 1])
    quarter = (1 - math.cos(math.pi / 4)) / 2
    close([wave.coef_at(s) for s in (10, 11, 12, 13)], [2, 2 - quarter, 1.5, 1 + quarter])


@given(VALUE, VALUE, st.integers(1, 200), STEP)
def test_a_switch_has_two_values(before: float, after: float, at: int, step: int) -> None:
    schedule = Switch(before, after, at)
    assert schedule.coef_at(step) == (before if step < at else after)
    assert schedule.coef_at(at - 1) == before and schedule.coef_at(at) == after
    assert schedule.extremes() == (min(before, after), max(before, after))


@given(st.floats(0, 1), st.floats(0, 1), st.floats(1e-6, 1), STEP)
def test_the_floor_is_never_crossed(a: float, b: float, fall: float, step: int) -> None:
    schedule = LinearWithFloor(max(a, b), min(a, b), fall)
    low, high = schedule.extremes()
    assert (low, high) == (min(a, b), max(a, b))
    assert low <= schedule.coef_at(step + 1) <= schedule.coef_at(step) <= high
    assert schedule.coef_at(step) in (low, high - fall * step)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(1, 4), st.floats(0, 0.2))
def test_a_plateau_switches_once_after_patience(
    values: list[float], patience: int, min_delta: float
) -> None:
    schedule = PlateauSwitch(2.0, 1.0, patience, min_delta)
    best, waited, expected = -math.inf, 0, None
    for step, value in enumerate(values):
        schedule.observe(value, step)
        if expected is None:
            better = value > best + min_delta
            best, waited = (value, 0) if better else (best, waited + 1)
            expected = step if waited == patience else None
        assert schedule.switched_at == expected
        # The past stays as it was.
        got = [schedule.coef_at(s) for s in range(len(values))]
        cut = len(values) if expected is None else expected
        assert got == [2.0] * cut + [1.0] * (len(values) - cut)
    copy = PlateauSwitch(2.0, 1.0, patience, min_delta)
    copy.load_state_dict(schedule.state_dict())
    for left in (schedule, copy):
        left.observe(0.0, len(values))
    assert copy.state_dict() == schedule.state_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(1.0, 0.0, end_step=0), r"`end_step` must come after begin_step 0: got 0\."),
        (lambda: Cosine(1.0, 0.0, 4, 9), r"`end_step` must come after begin_step 9: got 4\. .*Sw"),
        (lambda: Linear(1.0, 0.0, 5, -1), r"`begin_step` must be at least 0: got -1\."),
        (lambda: Linear(-1.0, 0.0, 5), r"`start` must be at least 0: got -1\.0\."),
        (lambda: Cosine(1.0, -0.5, 5), r"`end` must be at least 0: got -0\.5\."),
        (lambda: Linear(1.0, math.nan, 5), r"`end` must be at least 0: got nan\."),
        (lambda: Constant(-1.0), r"`value` must be at least 0: got -1\.0\."),
        (lambda: Constant(math.inf), r"`value` must be at least 0: got inf\."),
        (lambda: Switch(1.0, 0.0, 0), r"`at_step` must be at least 1: got 0\. .*use Constant"),
        (lambda: Switch(-1.0, 0.0, 3), r"`before` must be at least 0: got -1\.0\."),
        (lambda: Switch(1.0, -2.0, 3), r"`after` must be at least 0: got -2\.0\."),
        (lambda: PlateauSwitch(1.0, 0.0, 0), r"`patience` must be at least 1: got 0\."),
        (lambda: PlateauSwitch(1.0, 0.0, 1, -1.0), r"`min_delta` must be at least 0: got -1\.0\."),
        (lambda: PlateauSwitch(-1.0, 0.0), r"`before` must be at least 0: got -1\.0\."),
        (lambda: PlateauSwitch(1.0, -1.0), r"`after` must be at least 0: got -1\.0\."),
        (
            lambda: CoefficientSchedule("trrd_alpha", Linear(0.5, 1.2, 5)),
            r"`trrd_alpha` must be in \[0, 1\]: got 1\.2\.",
        ),
        (
            lambda: CoefficientSchedule("trrd_alpha", Switch(2.0, 0.5, 5)),
            r"`trrd_alpha` must be in \[0, 1\]: got 2\.0\.",
        ),
        (
            lambda: CoefficientSchedule("learning_rate", Constant(1.0)),
            r"`coefficient` must be one of rl_coef, .*trrd_alpha.*: got learning_rate\.",
        ),
        (
            lambda: CoefficientSchedule("rl_coef", Constant(1.0), "epoch"),  # type: ignore[arg-type]
            r"`unit` must be rollout or optimizer_step: got epoch\.",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("objective", "schedules", "message"),
    [
        (
            GRPO(),
            [CoefficientSchedule("trrd_alpha", Constant(0.5))],
            r"one of GRPO's \(.*\): got trrd_alpha\.",
        ),
        (
            KDRL(),
            [CoefficientSchedule("teacher_kl_coef", Constant(0.5)), KLCoefficientAnnealing()],
            r"`callbacks` must have one schedule for teacher_kl_coef: got 2\.",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    tmp_path: Path,
    student_folder: str,
    teacher_folder: str,
    objective: Objective,
    schedules: list[pl.Callback],
    message: str,
) -> None:
    data = make_data()
    with pytest.raises(ConfigurationError, match=message):
        fit(tmp_path, make_module(student_folder, teacher_folder, objective), data, schedules)
    assert data.watch.rollouts == 0


class Coefficients(pl.Callback):
    """Keeps a coefficient at the time a rollout is made, and at each update."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.at_rollouts: list[tuple[int, float]] = []
        self.at_updates: list[float] = []
        self.logged: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        prepare, log = pl_module.objective.prepare, pl_module.log_step

        def logging(values: dict[str, float]) -> None:
            self.logged += [v for name, v in values.items() if name.endswith(f"/{self.name}")]
            log(values)

        pl_module.log_step = logging

        def watched(rollout: Any) -> Any:
            value = pl_module.objective.coefficient(self.name)
            self.at_rollouts.append((trainer.global_step, value))
            return prepare(rollout)

        pl_module.objective.prepare = watched

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self.at_updates.append(pl_module.objective.coefficient(self.name))


OBJECTIVES = {
    "teacher_kl_coef": lambda: KDRL(9.0),
    "trrd_alpha": lambda: RLAD(0.123),
    "entropy_coef": lambda: GRPO(entropy_coef=9.0),
    "ref_kl_coef": lambda: GRPO(ref_kl_coef=9.0),
    "reward_coef": lambda: KDRL(0.5, form="advantage"),
    "rl_coef": lambda: KDRL(0.5, rl_coef=9.0),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_rollout_is_made_with_its_own_coefficient(
    tmp_path: Path, student_folder: str, teacher_folder: str, name: str
) -> None:
    seen = Coefficients(name)
    fit(
        tmp_path,
        make_module(student_folder, teacher_folder, OBJECTIVES[name]()),
        make_data(val_prompts=None),
        [CoefficientSchedule(name, Linear(0.8, 0.2, end_step=3)), seen],
        accumulate_grad_batches=2,
    )
    close([v for _, v in seen.at_rollouts], [0.8, 0.6, 0.4, 0.2])
    assert [step for step, _ in seen.at_rollouts] == [0, 2, 4, 6]
    per_rollout = [v for v in (0.8, 0.6, 0.4, 0.2) for _ in range(4)]
    close(seen.at_updates, per_rollout)
    # Logged is what the update used.
    close(seen.logged, per_rollout, 1e-6)


def test_steps_can_be_those_of_the_optimizer(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    seen = Coefficients("teacher_kl_coef")
    schedule = CoefficientSchedule("teacher_kl_coef", Linear(4.0, 0.0, 4), "optimizer_step")
    module = make_module(student_folder, teacher_folder, KDRL())
    fit(tmp_path, module, make_data(val_prompts=None), [schedule, seen], max_steps=6)
    close(seen.at_updates, [4, 3, 2, 1, 0, 0])


def test_two_schedules_side_by_side(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    first, second = Coefficients("teacher_kl_coef"), Coefficients("reward_coef")
    schedules = [
        CoefficientSchedule("teacher_kl_coef", Switch(1.0, 0.0, at_step=2)),
        CoefficientSchedule("reward_coef", Switch(0.0, 1.0, at_step=2)),
    ]
    module = make_module(student_folder, teacher_folder, KDRL(1.0, form="advantage"))
    fit(tmp_path, module, make_data(val_prompts=None), [*schedules, first, second])
    assert first.at_updates == [1.0] * 4 + [0.0] * 4
    assert second.at_updates == [0.0] * 4 + [1.0] * 4


def schedule_run(
    tmp_path: Path,
    student: str,
    teacher: str,
    schedule: Schedule,
    steps: int,
    resume: str | None = None,
    **data: Any,
) -> tuple[Coefficients, CoefficientSchedule, pl.Trainer]:
    seen = Coefficients("teacher_kl_coef")
    callback = CoefficientSchedule("teacher_kl_coef", schedule)
    trainer = make_trainer(tmp_path, max_steps=steps, callbacks=[callback, seen])
    module = make_module(student, teacher, KDRL(9.0))
    trainer.fit(module, datamodule=make_data(**data), ckpt_path=resume)
    return seen, callback, trainer


def test_a_resumed_run_needs_no_stored_state(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    folders, line = (student_folder, teacher_folder), lambda: Linear(0.8, 0.2, end_step=3)
    half = make_trainer(tmp_path, max_steps=4)  # without the callback
    half.fit(make_module(*folders, KDRL()), datamodule=make_data())
    file = str(tmp_path / "half.ckpt")
    half.save_checkpoint(file)
    seen, _, _ = schedule_run(tmp_path, *folders, line(), 8, file)
    close([v for _, v in seen.at_rollouts], [0.4, 0.2])


def test_the_memory_of_a_plateau_survives_a_resume(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    # Accuracy is 0 throughout: the first validation is the best, two more make it switch.
    data = {"rollouts_per_epoch": 1, "reward": lambda sample: 0.5 * (len(sample.ids) % 2)}
    folders = (student_folder, teacher_folder)
    whole, _, _ = schedule_run(tmp_path, *folders, PlateauSwitch(0.5, 0.1, patience=2), 10, **data)
    assert [v for _, v in whole.at_rollouts] == [0.5, 0.5, 0.5, 0.1, 0.1]
    _, callback, trainer = schedule_run(
        tmp_path, *folders, PlateauSwitch(0.5, 0.1, patience=2), 4, **data
    )
    assert callback.schedule.waited == 1  # type: ignore[attr-defined]
    file = str(tmp_path / "half.ckpt")
    trainer.save_checkpoint(file)
    rest, again, _ = schedule_run(
        tmp_path, *folders, PlateauSwitch(0.5, 0.1, patience=2), 10, file, **data
    )
    assert [v for _, v in rest.at_rollouts] == [0.5, 0.1, 0.1]
    assert again.schedule.switched_at == 3  # type: ignore[attr-defined]


def test_a_sanity_check_is_no_validation_of_a_plateau() -> None:
    callback = CoefficientSchedule("teacher_kl_coef", PlateauSwitch(1.0, 0.0, patience=1))
    module: Any = SimpleNamespace(objective=KDRL())
    state = SimpleNamespace(fn=TrainerFn.FITTING)
    trainer: Any = SimpleNamespace(sanity_checking=True, callback_metrics={}, state=state)
    callback.on_validation_end(trainer, module)
    trainer.sanity_checking, state.fn = False, TrainerFn.VALIDATING
    callback.on_validation_end(trainer, module)  # trainer.validate() is none of the run's either
    state.fn = TrainerFn.FITTING
    with pytest.raises(ConfigurationError, match=r"`monitor` .* got val/accuracy\. Known: \."):
        callback.on_validation_end(trainer, module)
    trainer.callback_metrics = {"val/accuracy": torch.tensor(0.5)}
    trainer.global_step, trainer.datamodule = 6, SimpleNamespace(updates_per_rollout=2)
    callback.on_validation_end(trainer, module)
    assert module.objective.coefficient("teacher_kl_coef") == 1.0
    callback.on_validation_end(trainer, module)
    assert module.objective.coefficient("teacher_kl_coef") == 0.0
    assert callback.schedule.switched_at == 3  # type: ignore[attr-defined]


def test_states_of_two_plateaus_are_kept_apart() -> None:
    keys = {
        CoefficientSchedule(name, PlateauSwitch(1.0, 0.0)).state_key
        for name in ("teacher_kl_coef", "entropy_coef")
    }
    assert len(keys) == 2
    assert CoefficientSchedule("entropy_coef", Constant(1.0)).state_dict() == {}


def test_statistics_see_the_coefficient_of_their_update(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    """The schedule stands in front of the statistics, as the command line puts it."""
    schedule = CoefficientSchedule("trrd_alpha", Switch(0.0, 1.0, at_step=1))
    stats = SelectiveImitationStats()
    module = make_module(student_folder, teacher_folder, RLAD())
    fit(tmp_path, module, make_data(val_prompts=None), [schedule, stats], max_steps=8)
    weights = ["kd/offset_weight_max" in row for row in stats.rows]
    assert weights == [True] + [False] * (len(weights) - 1) and len(weights) > 1


def test_a_second_run_starts_anew(tmp_path: Path, student_folder: str, teacher_folder: str) -> None:
    plateau = PlateauSwitch(1.0, 0.5, patience=1)
    module = make_module(student_folder, teacher_folder, KDRL(0.3))
    for _ in range(2):
        fit(tmp_path, module, make_data(), [CoefficientSchedule("teacher_kl_coef", plateau)])
        assert module.objective.coefficient("teacher_kl_coef") == 0.3
        assert plateau.switched_at is None or plateau.switched_at > 0
