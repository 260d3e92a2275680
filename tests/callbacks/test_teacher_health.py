"""TeacherHealth: what it measures, when it warns, and when it does not."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.fake_module import FakeModule
from helpers.short_runs import make_data, make_module, make_trainer
from kdrl_lightning import GRPO, KDRL, LocalTeacher, SelfTeacher, Verdict
from kdrl_lightning.callbacks import RunReport, SelectiveImitationStats, TeacherHealth
from kdrl_lightning.engines import Completion
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.metrics.completion_texts import (
    HEDGES,
    REFERENCES,
    appeals,
    count_words,
    repeated_frac,
)
from kdrl_lightning.metrics.health_signs import SIGNS, Rows, falling_pass
from kdrl_lightning.rollout.generation import Judged
from kdrl_lightning.rollout_batch import STUDENT, TEACHER
from kdrl_lightning.teachers import LiveWeights, MovingAverage

W = 3  # rollouts of a level


def rows(**values: list[float]) -> list[dict[str, float]]:
    """One row per rollout, from a list of values for each name."""
    names = {name.replace("__", "/"): series for name, series in values.items()}
    length = max(map(len, names.values()))
    return [{n: s[i] for n, s in names.items() if i < len(s)} for i in range(length)]


FINE: dict[str, tuple[Rows, ...]] = {
    "leakage": (
        rows(health__leak_frac=[0.0, 0.01, 0.04]),
        rows(health__leak_frac=[0.5, 0.5]),
        rows(health__leak_frac=[0.9, 0.0, 0.0, 0.0]),
    ),
    "flat KL": (
        rows(kd__reverse_kl=[0.5, 0.5, 0.5, 0.4, 0.4, 0.4]),
        rows(kd__reverse_kl=[0.5] * 5),
        rows(kd__reverse_kl=[-0.01] * 6),
        rows(kd__reverse_kl=[0.0] * 6),
    ),
    "sure teacher": (
        rows(kd__teacher_entropy=[0.02] * 6, policy__entropy=[0.03] * 6),
        rows(kd__teacher_entropy=[0.06] * 6, policy__entropy=[0.5] * 6),
        rows(kd__teacher_entropy=[0.01] * 6),
    ),
    "lost hedging": (
        rows(health__hedges_mean=[9.0] * 3 + [1.0] * 3, rollout__length_mean=[80.0] * 6),
        rows(health__hedges_mean=[9.0] * 6, rollout__length_mean=[80.0] * 3 + [20.0] * 3),
        rows(health__hedges_mean=[0.0] * 6, rollout__length_mean=[80.0] * 3 + [20.0] * 3),
    ),
    "loops": (
        rows(health__repeat_frac=[0.1] * 3 + [0.29] * 3),
        rows(health__repeat_frac=[0.6] * 6),
        rows(health__repeat_frac=[0.0] * 2 + [0.9] * 3),
    ),
}
ILL: dict[str, tuple[Rows, str, str]] = {
    "leakage": (rows(health__leak_frac=[0.0, 0.02, 0.04, 0.03]), "3.0%", "Show the teacher less"),
    "flat KL": (rows(kd__reverse_kl=[0.5, 0.5, 0.5, 0.2, 0.48, 0.46, 0.47]), "0.47", "RLSD"),
    "sure teacher": (
        rows(kd__teacher_entropy=[0.3] * 3 + [0.012] * 3, policy__entropy=[0.4] * 6),
        "0.012 nats",
        "the answer instead of the solution",
    ),
    "lost hedging": (
        rows(
            health__hedges_mean=[9.0] * 3 + [1.0] * 3,
            rollout__length_mean=[80.0] * 3 + [50.0] * 3,
        ),
        "1 hedging words and 50 tokens",
        "initial weights",
    ),
    "loops": (rows(health__repeat_frac=[0.1] * 3 + [0.31] * 3), "31.0%", "slower teacher"),
}


@pytest.mark.parametrize("name", SIGNS)
def test_a_sign_speaks_with_figure_and_cure_or_not_at_all(name: str) -> None:
    for healthy in (*FINE[name], []):
        assert SIGNS[name](healthy, W) is None, healthy
    seen, figure, cure = ILL[name]
    line = SIGNS[name](seen, W)
    assert line is not None and figure in line and cure in line and "\n" not in line


def test_a_falling_pass_is_seen_if_the_reward_rises() -> None:
    def validations(*pairs: tuple[float, float]) -> Rows:
        return [{"k": 8.0, "pass": p, "reward": r} for p, r in pairs]

    line = falling_pass(validations((0.5, 0.1), (0.6, 0.2), (0.55, 0.3), (0.57, 0.4)), W)
    assert line is not None and "pass@8 fell from 0.6 to 0.57" in line and "0.2 to 0.4" in line
    for fine in (
        validations((0.6, 0.2), (0.5, 0.3)),
        validations((0.6, 0.2), (0.5, 0.3), (0.59, 0.4)),
        validations((0.6, 0.2), (0.59, 0.3), (0.5, 0.4)),
        validations((0.6, 0.2), (0.5, 0.2), (0.5, 0.1)),
    ):
        assert falling_pass(fine, W) is None


def test_texts_are_read_as_words() -> None:
    text = "Hmm, maybe 4. Wait: it MIGHT be 5; waiting, checked, unlikely."
    assert count_words(text, HEDGES) == 4
    assert appeals("By the ANSWER KEY it is 4.", "2 + 2?", REFERENCES)
    assert not appeals("By the answer key it is 4.", "The Answer Key says 4. 2 + 2?", REFERENCES)
    assert not appeals("It is 4.", "", REFERENCES)
    assert repeated_frac([5] * 108) == pytest.approx(100 / 101)
    assert repeated_frac(list(range(100))) == repeated_frac([]) == 0.0


def judged(text: str, ids: list[int], source: int = STUDENT) -> Judged:
    completion = Completion(ids, [0.0] * len(ids), False)
    return Judged([1], {"prompt": "2 + 2 = ?"}, completion, text, Verdict(0.0, False), source)


class Run:
    """A trainer, a module and data as the callback sees them."""

    def __init__(self, ranks: int = 1) -> None:
        self.module: Any = FakeModule(GRPO(), ranks)
        self.data = SimpleNamespace(
            updates_per_rollout=1, collector=SimpleNamespace(latest=[]), val_prompts=None
        )
        self.trainer: Any = SimpleNamespace(
            datamodule=self.data,
            callback_metrics={},
            is_global_zero=True,
            sanity_checking=False,
            global_step=0,
        )

    def rollout(self, health: TeacherHealth, texts: list[Judged], **metrics: float) -> None:
        """Make a rollout; what its updates log is there when the next one starts."""
        self.data.collector.latest = texts
        health.on_rollout_start(self.trainer, self.module, None, self.trainer.global_step)
        named = {name.replace("__", "/"): torch.tensor(v) for name, v in metrics.items()}
        self.trainer.callback_metrics.update(named)
        self.trainer.global_step += 1


LEAKY = [judged("maybe 4, wait", [1, 2, 3]), judged("the hint says 4", [5] * 16)]


def test_texts_of_all_ranks_are_logged_once_per_rollout() -> None:
    run, health = Run(ranks=2), TeacherHealth(window=2)
    run.rollout(health, [*LEAKY, judged("wait the answer key", [5] * 16, TEACHER)])
    expected = {
        "health/leak_frac": 0.5,
        "health/hedges_mean": 1.0,
        "health/repeat_frac": pytest.approx((8 / 9) / 2),
    }
    assert run.module.logged == [expected]
    run.rollout(health, [])
    assert health.rows == [expected] and run.module.logged[1] == {}


def test_each_warning_comes_once_and_survives_a_resume() -> None:
    run, health = Run(), TeacherHealth(window=2)
    run.rollout(health, LEAKY, kd__reverse_kl=0.5)
    run.rollout(health, LEAKY, kd__reverse_kl=0.5)
    with pytest.warns(UserWarning, match=r"^leakage: 50\.0% of the completions of the last 2 "):
        run.rollout(health, LEAKY, kd__reverse_kl=0.5)
    again = TeacherHealth(window=2)
    again.load_state_dict(health.state_dict())
    assert again.events == [(2, "leakage")]
    run.rollout(again, LEAKY, kd__reverse_kl=0.5)
    with pytest.warns(UserWarning, match=r"^flat KL: ") as caught:
        again.on_train_end(run.trainer, run.module)
    assert len(caught) == 1 and len(again.rows) == 4
    assert again.events == [(2, "leakage"), (4, "flat KL")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.on_train_end(run.trainer, run.module)
        run.trainer.is_global_zero = False
        other = TeacherHealth(window=1)
        run.rollout(other, LEAKY)
        run.rollout(other, LEAKY)  # another rank keeps the event and says nothing
    assert other.events == [(1, "leakage")]
    other.setup(run.trainer, run.module, "fit")
    assert other.events == other.rows == []


def test_held_out_pass_is_that_of_the_largest_k() -> None:
    run, health = Run(), TeacherHealth(window=1)
    metrics = run.trainer.callback_metrics
    health.on_validation_end(run.trainer, run.module)  # there is no reward yet
    for passed, reward in ((0.5, 0.1), (0.9, 0.2), (0.8, 0.3), (0.7, 0.4)):
        run.rollout(health, LEAKY[:1], reward__mean=reward)
        run.rollout(health, [])
        metrics |= {"val/pass_at_2": torch.tensor(0.1), "val/pass_at_16": torch.tensor(passed)}
        if passed == 0.7:
            with pytest.warns(UserWarning, match=r"^falling pass@k: held-out pass@16 fell from"):
                health.on_validation_end(run.trainer, run.module)
        else:
            health.on_validation_end(run.trainer, run.module)
    rewards = [row["reward"] for row in health.validations]
    assert rewards == pytest.approx([0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(("name", "value"), [("window", 0), ("prompts", -1)])
def test_bad_settings_are_refused(name: str, value: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"^`{name}` must be .* got {value}"):
        TeacherHealth(**{name: value})  # type: ignore[arg-type]


# ---- the teacher after its own prompt, measured before the run


class Written:
    """As a ``TeacherPrompt``: the row's reference in front."""

    def __init__(self, of_row: Callable[[Any], str | None] | None) -> None:
        self.context = SimpleNamespace() if of_row is None else SimpleNamespace(of_row=of_row)

    def ids(self, tokenizer: Any, row: Any, context: str = "") -> list[int]:
        return list(tokenizer(context + row["prompt"], add_special_tokens=False)["input_ids"])


class Behind(SelfTeacher):
    """As a ``PromptedTeacher``."""

    has_own_prompt = True

    def __init__(self, rule: Any, of_row: Callable[[Any], str | None] | None) -> None:
        super().__init__(rule)
        self.prompt = Written(of_row)


def rewarded_after(sample: Any) -> Verdict:
    """A random model: right by length alone."""
    odd = float(len(sample.ids) % 2)
    return Verdict(odd, bool(odd))


@pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")
def test_a_teacher_no_better_than_the_student_is_named_before_the_run(
    tmp_path: Path, student_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind an empty context it is the student itself."""
    drawn: list[Any] = []
    monkeypatch.setattr("kdrl_lightning.callbacks.report.plot_curves", lambda *a: drawn.append(a))
    health = TeacherHealth(window=1, prompts=6)
    live = Behind(LiveWeights(), lambda row: "")
    module = make_module(student_folder, live, KDRL(0.1))
    callbacks = [health, SelectiveImitationStats(), RunReport(export=False)]
    trainer = make_trainer(tmp_path, callbacks=callbacks, max_steps=4)
    data = make_data(reward=rewarded_after, prompts_per_rollout=2)
    with pytest.warns(UserWarning, match=r"^weak teacher: .* no better than the student's .*%"):
        trainer.fit(module, datamodule=data)
    assert health.events[0] == (0, "weak teacher")
    summary = drawn[0][3]
    assert summary["warnings"]["weak teacher"] == 0
    assert summary["teacher_accuracy"] == health.teacher_accuracy is not None
    assert {"kd/reverse_kl", "health/leak_frac", "reward/mean"} <= health.rows[-1].keys()
    assert len(health.rows) == 2


def measured(health: TeacherHealth, module: Any, scores: dict[bool, float], tmp_path: Path) -> Any:
    """Measure with data that answers right as often as ``scores`` says, with a prompt or not."""
    asked = []

    def evaluate(weights: Any, prompt_of: Any = None, most: float = 0) -> float:
        asked.append((weights.path, prompt_of, most))
        return scores[prompt_of is not None]

    data = SimpleNamespace(updates_per_rollout=1, val_prompts=[1], evaluate=evaluate)
    trainer: Any = SimpleNamespace(
        datamodule=data, global_step=0, limit_val_batches=1.0, is_global_zero=True
    )
    module.log_step = lambda values: asked.append(values)
    health.on_train_start(trainer, module)
    return asked


def test_only_a_teacher_whose_prompt_the_row_decides_is_measured(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    scores = {True: 0.5, False: 0.25}
    health = TeacherHealth(prompts=8)
    moving = Behind(MovingAverage(), lambda row: row.get("answer"))
    module: Any = make_module(student_folder, moving, KDRL(0.1))
    module.configure_model()
    found = measured(health, module, scores, tmp_path)
    (path, prompt_of, most), (second, none, _), logged = found
    assert path == second == student_folder and none is None and most == 8
    tokenizer = module.tokenizer
    ids = prompt_of({"prompt": "1+2=", "answer": "3"})
    assert tokenizer.decode(ids).replace(" ", "") == "31+2="
    assert prompt_of({"prompt": "1+2="}) is None
    assert logged == {"health/teacher_accuracy": 0.5, "health/student_accuracy": 0.25}
    assert health.events == [] and health.teacher_accuracy == 0.5
    for teacher, prompts in (
        (Behind(MovingAverage(), None), 8),  # siblings
        (SelfTeacher(MovingAverage()), 8),
        (LocalTeacher(teacher_folder), 8),
        (None, 8),
        (moving, 0),
    ):
        module.teacher = teacher
        assert measured(TeacherHealth(prompts=prompts), module, scores, tmp_path) == []
    outer: Any = SimpleNamespace(teacher=LocalTeacher(teacher_folder), prompt=moving.prompt)
    outer.has_own_prompt = True
    outer.teacher.load(torch.device("cpu"))
    module.teacher = outer
    assert measured(TeacherHealth(), module, scores, tmp_path)[0][0] == teacher_folder


def test_the_picture_marks_the_warnings(tmp_path: Path) -> None:
    from kdrl_lightning.callbacks.reports.plots import plot_curves

    curves = [{"rollout": r + 1, "reward/correct_frac": 0.5} for r in range(4)]
    sizes = []
    for name, marks in (("plain", {}), ("marked", {"leakage": 2, "weak teacher": 0})):
        file = tmp_path / f"{name}.png"
        plot_curves(file, curves, [], {"method": "KDRL", "seed": 0, "warnings": marks})
        sizes.append(file.read_bytes())
    assert sizes[0] != sizes[1] and all(re.match(rb"\x89PNG", data) for data in sizes)
