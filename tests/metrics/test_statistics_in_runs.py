"""Statistics of whole runs: every documented name, and equal values however a step is cut."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.fake_module import FakeModule
from helpers.reference import f64
from helpers.short_runs import Log, fit, make_data, make_module
from kdrl_lightning import GRPO, KDRL, RLAD
from kdrl_lightning.callbacks import SelectiveImitationStats
from kdrl_lightning.callbacks.reports.token_stats import MicroBatch, add_imitation_stats
from kdrl_lightning.metrics import StepStats
from kdrl_lightning.objectives import Objective
from kdrl_lightning.objectives.ratios import ShapedProbability
from kdrl_lightning.objectives.selections import WrongCompletions
from kdrl_lightning.rollout_batch import TEACHER, RolloutBatch, collate

# A random model stops late and is rarely right.
pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")

SETTINGS: dict[str, Any] = {"val_prompts": None, "epochs_per_rollout": 2}


def documented() -> set[str]:
    """Names in the callback's docstring; ``_low`` and the like end the names of their line."""
    names: set[str] = set()
    for item in (SelectiveImitationStats.__doc__ or "").split("\n    - ")[1:]:
        words = re.findall(r"``([\w/]+)``", item)
        own = {word for word in words if re.match(r"(kd|policy)/", word)}
        ends = {word for word in words if word.startswith("_")}
        names |= own | {name.removesuffix("_max") + end for name in own for end in ends}
    # One line names two things and the end of the second.
    return names - {"kd/offset_clamp_frac_p99"}


def run(
    tmp_path: Path,
    student: str,
    teacher: str | None,
    objective: Objective,
    callback: SelectiveImitationStats | None = None,
    accumulate: int = 1,
    **data: Any,
) -> list[dict[str, float]]:
    log = Log()
    fit(
        tmp_path,
        make_module(student, teacher, objective, "float64"),
        make_data(**{**SETTINGS, **data}),
        [callback or SelectiveImitationStats(), log],
        max_steps=4,
        accumulate_grad_batches=accumulate,
        precision="64-true",
    )
    return log.rows


def test_every_documented_name_is_logged(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    names = documented()
    assert {"kd/offset_weight_p99", "policy/clip_frac_low", "kd/reverse_kl_k3_wrong"} <= names
    offset = {name for name in names if "offset" in name}
    folders = (student_folder, teacher_folder)
    rlad = run(tmp_path, *folders, RLAD())
    kdrl = run(tmp_path, *folders, KDRL(0.5))
    for row in rlad:
        assert names <= set(row), names - set(row)
    for row in kdrl:
        assert names - offset <= set(row) and not offset & set(row)
    logged = {n for row in rlad + kdrl for n in row if n.startswith("kd/")}
    assert logged - names == {"kd/floored_frac"}
    for row in rlad:
        assert row["kd/offset_weight_p99"] <= row["kd/offset_weight_max"] <= 2.718281829**0.5
        sides = row["policy/clip_frac_low"] + row["policy/clip_frac_high"]
        assert sides == pytest.approx(row["policy/clip_frac"], abs=1e-6)
    # The second pass over the rollout: the ratio has moved.
    assert kdrl[3]["policy/ratio_max"] > 1.0 == kdrl[0]["policy/ratio_max"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: RLAD(),
        lambda: KDRL(0.5, selection=[WrongCompletions()]),
        lambda: GRPO(teacher_tokens=ShapedProbability()),
    ],
    ids=["rlad", "kdrl_mask", "luffy"],
)
def test_cutting_a_step_changes_no_statistic(
    tmp_path: Path, student_folder: str, teacher_folder: str, make: Any
) -> None:
    folders = (student_folder, teacher_folder)
    data = {"teacher_completions": 1} if isinstance(make(), GRPO) else {}
    one, five = (run(tmp_path, *folders, make(), accumulate=n, **data) for n in (1, 5))
    prefixes = ("kd/", "policy/", "loss/", "reward/", "teacher/")
    for a, b in zip(one, five, strict=True):
        names = {n for n in a if n.startswith(prefixes)}
        assert len(names) > 15
        for name in names:
            # The second pass is equal to the rounding inside the model's norms.
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name


# Three groups of two completions of two tokens; log rho is 0.
SOURCES = [0, 0, 0, 0, 0, TEACHER]
CORRECT = [True, False, False, False, True, True]
OLD = [[-1.0, -2.0], [-0.5, -1.0], [-1.0, -1.0], [-2.0, -3.0], [-1.0, -1.0], [-1.0, -1.0]]
GAP = [[0.1, 0.2], [0.5, -0.4], [2.0, -0.3], [0.0, -0.1], [0.0, 0.0], [5.0, 5.0]]  # of the teacher
TOP = [[3, 4], [3, 4], [3, 4], [3, 4], [3, 4], [3, 4]]
TEACHER_TOP = [[3, 4], [3, 5], [9, 9], [3, 4], [3, 9], [9, 9]]


def case() -> RolloutBatch:
    batch = collate(
        [[1]] * 6, [[3, 4]] * 6, [0, 0, 1, 1, 2, 2], pad_id=0, correct=CORRECT, source=SOURCES
    )
    old = f64(OLD)
    return batch.replace(
        old_logprobs=old,
        teacher_logprobs=old + f64(GAP),
        rollout_logprobs=old,
        teacher_entropy=f64([[0.5, 1.0]] * 5 + [[2.0, 3.0]]),
        teacher_top_ids=torch.tensor(TEACHER_TOP),
        topk_ids=torch.tensor(TOP)[..., None].expand(6, 2, 2),
        advantages=f64([1.0, -1.0, 1.0, -1.0, 0.0, 0.0]),
        imitation_mask=batch.loss_mask,
        totals=batch.count(2),
    )


def feed(
    callback: SelectiveImitationStats,
    module: FakeModule,
    batch: RolloutBatch,
    parts: list[list[int]],
) -> dict[str, float]:
    trainer: Any = SimpleNamespace(
        accumulate_grad_batches=len(parts),
        num_training_batches=len(parts),
        global_step=1,
        loggers=[],
        datamodule=None,
    )
    for index, rows in enumerate(parts):
        part = batch.select(rows)
        scores = {"logprobs": part.old_logprobs, "entropy": -part.old_logprobs}
        callback.on_train_batch_end(trainer, module, scores, part, index)
    return module.logged[-1]


PARTS = [[[0, 1, 2, 3, 4, 5]], [[0, 2, 4], [1, 3, 5]], [[5, 0], [3], [1, 2, 4]]]


@pytest.mark.parametrize("parts", PARTS)
def test_completions_and_groups_by_hand(parts: list[list[int]]) -> None:
    objective = KDRL(0.5, selection=[WrongCompletions()])
    batch = case()
    wrong = ~torch.tensor(CORRECT)[:, None] & batch.loss_mask
    got = feed(
        SelectiveImitationStats(), FakeModule(objective), batch.replace(imitation_mask=wrong), parts
    )
    # Wrong are completions 1, 2 and 3: groups 0 and 1.
    assert got["kd/imitation_frac"] == pytest.approx(6 / 12)
    assert got["kd/imitated_completions_frac"] == pytest.approx(3 / 6)
    assert got["kd/imitated_groups_frac"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("parts", PARTS)
def test_agreement_and_entropy_of_the_teacher_by_hand(parts: list[list[int]]) -> None:
    got = feed(SelectiveImitationStats(), FakeModule(KDRL()), case(), parts)
    # Per row the same best token: 2, 1, 0, 2, 1, 0 of 2.
    assert got["kd/top_token_agreement"] == pytest.approx(6 / 12)
    assert got["kd/teacher_entropy"] == pytest.approx((5 * 1.5 + 5.0) / 12)


@pytest.mark.parametrize("parts", PARTS)
def test_estimates_of_the_kl_by_hand(parts: list[list[int]]) -> None:
    got = feed(SelectiveImitationStats(), FakeModule(KDRL()), case(), parts)
    own = f64(GAP[:5])  # the teacher's own completion is no sample of the student
    k3 = own.exp() - 1 - own
    assert got["kd/reverse_kl"] == pytest.approx(float(-own.mean()))
    assert got["kd/reverse_kl_k3"] == pytest.approx(float(k3.mean()))
    assert got["kd/reverse_kl_k3_correct"] == pytest.approx(float(k3[[0, 4]].mean()))
    assert got["kd/reverse_kl_k3_wrong"] == pytest.approx(float(k3[[1, 2, 3]].mean()))
    # The student's tokens with an advantage: of (.1, .2), (.5, -.4) at -1, (2, -.3), (0, -.1) at -1
    # the teacher would push .5 and -.3 the other way.
    assert got["kd/conflict_frac"] == pytest.approx(2 / 8)


@pytest.mark.parametrize("parts", PARTS)
def test_the_weight_of_trrd_by_hand(parts: list[list[int]]) -> None:
    objective = RLAD(trrd_alpha=0.5, log_ratio_clamp=None)
    got = feed(SelectiveImitationStats(), FakeModule(objective), case(), parts)
    # w = e^(-gap / 2), largest at the gap of -.4; the teacher's own row has none.
    largest = 2.718281828459045**0.2
    assert got["kd/offset_weight_max"] == pytest.approx(largest)
    # 12 tokens: the 99 % quantile is the largest value, to the width of a bin (.02 in log w).
    assert largest * 0.98 <= got["kd/offset_weight_p99"] <= largest
    # r = w: above 1.2 is e^.2 = 1.221; below 0.8 are e^-.25 = .779 and e^-1.
    assert got["policy/clip_frac_high"] == pytest.approx(1 / 12)
    assert got["policy/clip_frac_low"] == pytest.approx(2 / 12)
    assert got["policy/clip_frac"] == pytest.approx(3 / 12)
    clamped = RLAD(trrd_alpha=0.5, offset_clamp=0.45)
    got = feed(SelectiveImitationStats(), FakeModule(clamped), case(), parts)
    assert got["kd/offset_clamp_frac"] == pytest.approx(2 / 10)  # .5 and 2


@pytest.mark.parametrize("objective", [KDRL(), RLAD()], ids=lambda o: type(o).__name__)
def test_equal_ranks_leave_every_mean_as_it_is(objective: Objective) -> None:
    alone, both = FakeModule(objective), FakeModule(objective, ranks=2)
    batch = case()
    expected = feed(SelectiveImitationStats(), alone, batch, PARTS[1])
    counts = {name: 2 * value for name, value in expected.items() if name.endswith("_tokens")}
    assert counts and feed(SelectiveImitationStats(), both, batch, PARTS[1]) == expected | counts


@pytest.mark.parametrize("objective", [KDRL(), RLAD()], ids=lambda o: type(o).__name__)
def test_a_rank_without_loss_tokens_reduces_the_same_shapes(objective: Objective) -> None:
    # Or two ranks would wait for each other for ever.
    batch, full, empty = case(), FakeModule(objective), FakeModule(objective)
    feed(SelectiveImitationStats(), full, batch, PARTS[1])
    nothing = torch.zeros_like(batch.loss_mask)
    got = feed(SelectiveImitationStats(), empty, batch.replace(loss_mask=nothing), PARTS[1])
    assert full.shapes == empty.shapes
    assert not any(name.startswith("kd/imitated") for name in got)


def test_teacher_rows_do_not_enter_the_students_estimates() -> None:
    stats, batch = StepStats(), case()
    add_imitation_stats(stats, MicroBatch(KDRL(), batch, batch.old_logprobs))
    kept = stats.compute()
    far = batch.replace(teacher_logprobs=batch.teacher_logprobs + 9.0 * f64(SOURCES)[:, None])
    add_imitation_stats(stats, MicroBatch(KDRL(), far, batch.old_logprobs))
    assert stats.compute() == kept


@pytest.mark.usefixtures("pictures")
def test_histograms_table_and_picture_of_a_run(
    tmp_path: Path, student_folder: str, teacher_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = SelectiveImitationStats(histogram_every=2, table_rollouts=2)
    data = make_data(val_prompts=None, minibatches_per_rollout=1)
    module = make_module(student_folder, teacher_folder, RLAD())
    trace = fit(tmp_path, module, data, [callback], max_steps=5)
    assert [row["rollout"] for row in callback.rows] == [1, 2, 3, 4, 5]
    assert sorted(callback.histograms) == [1, 3, 5]
    for rollout, histograms in callback.histograms.items():
        tokens = float(trace.seen[rollout - 1][1].loss_mask.sum())
        assert set(histograms) == {
            "hist/teacher_gap",
            "hist/log_ratio",
            "hist/log_offset_weight",
            "hist/entropy",
        }
        assert all(float(h.counts.sum()) == tokens for h in histograms.values())
    assert (tmp_path / "imitation.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    (line,) = [text for text in out.splitlines() if "kd/reverse_kl " in text]
    values = [row["kd/reverse_kl"] for row in callback.rows]
    expected = [f"{sum(part) / 2:.3f}" for part in (values[:2], values[-2:])]
    assert line.split() == ["kd/reverse_kl", *expected]
    assert "first 2" in out and "last 2" in out


def test_the_rows_survive_a_resume() -> None:
    callback, again = SelectiveImitationStats(), SelectiveImitationStats()
    callback.rows = [{"rollout": 1.0, "kd/a": 2.0}]
    again.load_state_dict(callback.state_dict())
    assert again.rows == callback.rows
