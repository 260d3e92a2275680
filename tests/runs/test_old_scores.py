"""No scoring pass of the student runs if the first update's forward pass gives its scores."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from helpers.short_runs import Log, ScoredBefore, fit, make_data, make_module
from kdrl_lightning import (
    GKD,
    GRPO,
    KDRL,
    RLAD,
    SRPO,
    LocalTeacher,
    OnPolicyDistillation,
    PolicyObjective,
)
from kdrl_lightning.callbacks import SelectiveImitationStats, WeightSyncCheck
from kdrl_lightning.engines import TransformersEngine
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.objectives import (
    SFT,
    Advantage,
    Gates,
    NoCorrection,
    Objective,
    SurrogateTerm,
    TokenRatio,
    TruncatedImportance,
    TrustRegionRatio,
    VocabularyKL,
    WrongCompletions,
)
from kdrl_lightning.rollout_batch import RolloutBatch, collate

# A random model stops late and is rarely right.
pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")


def rollout(exact: bool = True) -> RolloutBatch:
    return collate([[1]], [[2]], [0], pad_id=0).replace(engine_exact=exact)


class Peeks(Advantage):
    """Reads without saying so."""

    def prepare(self, rollout: RolloutBatch) -> torch.Tensor:
        assert rollout.old_logprobs is None
        return super().prepare(rollout)


class Own(PolicyObjective):
    def prepare(self, rollout: RolloutBatch) -> RolloutBatch:
        return super().prepare(rollout)


@pytest.mark.parametrize(
    ("objective", "reads"),
    [
        (GRPO(), False),
        (RLAD(), False),
        (KDRL(), False),
        (SRPO(), False),
        (SFT(), False),
        (OnPolicyDistillation(kd_ratio_weight=True), False),
        (KDRL(selection=[WrongCompletions()]), False),
        (KDRL(selection=[Gates(advantage_threshold=0.0)]), False),
        (KDRL(selection=[WrongCompletions(), Gates(alignment_threshold=1.0)]), True),
        (KDRL(selection=[Gates(exploration_entropy=1.0)]), True),
        (KDRL(form="reward_shaping"), True),
        (KDRL(kl_estimator="top_k"), True),
        (GKD(top_k=1), True),
        (GRPO(engine_correction=TruncatedImportance()), True),
        (GRPO(distill=SurrogateTerm(TrustRegionRatio())), False),
        (
            GRPO(
                distill=SurrogateTerm(TrustRegionRatio()), engine_correction=TruncatedImportance()
            ),
            True,
        ),
        (Own(TokenRatio(), Advantage()), True),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Objective) else str(x),
)
def test_an_objective_says_what_it_reads(objective: Objective, reads: bool) -> None:
    assert objective.reads_old_scores(rollout()) == reads


def test_an_engine_that_is_not_exact_is_corrected_with_them() -> None:
    assert GRPO().reads_old_scores(rollout(exact=False))
    assert not GRPO(engine_correction=NoCorrection()).reads_old_scores(rollout(exact=False))


def passes(
    tmp_path: Path, student: str, teacher: str, objective: Objective, **settings: Any
) -> tuple[list[int], list[dict[str, float]], list[torch.Tensor]]:
    """Rows of the student's passes without gradient, logged metrics, and the weights afterwards."""
    module, log, rows = make_module(student, teacher, objective), Log(), []
    module.configure_model()
    assert module.student is not None
    scored = module.student.score

    def score(batch: RolloutBatch, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            rows.append(len(batch))
        return scored(batch, *args, **kwargs)

    module.student.score = score  # type: ignore[method-assign]
    stats = [SelectiveImitationStats(), WeightSyncCheck(), log]
    fit(tmp_path, module, make_data(**settings), stats, max_steps=4)
    return rows, log.rows, [v.clone() for _, v in module.weights().named_tensors()]


@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_run_is_the_same_without_the_second_pass(
    tmp_path: Path, student_folder: str, teacher_folder: str, minibatches: int
) -> None:
    settings = {"minibatches_per_rollout": minibatches}
    folders = (tmp_path, student_folder, teacher_folder)
    rows, logged, weights = passes(*folders, RLAD(), **settings)
    before, expected, same = passes(*folders, ScoredBefore(), **settings)
    # 16 completions a rollout; of two mini-batches only the second is scored ahead.
    assert rows == ([] if minibatches == 1 else [8, 8])
    assert before == ([16] * 4 if minibatches == 1 else [8] * 4)
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    for ours, theirs in zip(logged, expected, strict=True):
        names = {n for n in theirs if not n.startswith(("time/", "memory/", "tokens_per_s"))}
        assert names <= set(ours)
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], nan_ok=True), name
        assert 0.0 <= ours["rollout/mismatch_kl"] < 1e-8
        assert ours["rollout/logprob_diff_max"] < 1e-3


class Inexact(TransformersEngine):
    """Its log-probabilities have to be corrected."""

    exact = False


class ReadsBoth(KDRL):
    """The same, but scored before, by student and teacher."""

    def reads_old_scores(self, rollout: RolloutBatch) -> bool:
        return True

    def reads_teacher_scores(self, rollout: RolloutBatch) -> bool:
        return True


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_teacher_that_the_update_runs_is_not_run_before(
    tmp_path: Path,
    student_folder: str,
    teacher_folder: str,
    minibatches: int,
    exact: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: list[int] = []
    scored = LocalTeacher.score

    def score(self: LocalTeacher, batch: RolloutBatch, *args: Any) -> Any:
        rows.append(len(batch))
        return scored(self, batch, *args)

    monkeypatch.setattr(LocalTeacher, "score", score)
    engine = TransformersEngine if exact else Inexact
    settings: dict[str, Any] = {"minibatches_per_rollout": minibatches}
    folders = (tmp_path, student_folder, teacher_folder)
    full: dict[str, Any] = {"kl_estimator": "full_vocabulary"}
    student, logged, weights = passes(
        *folders, KDRL(0.5, **full), rollout_engine=engine(), **settings
    )
    assert not rows
    # 64 completions in four rollouts, or 32 in two; half of those are of a second mini-batch.
    assert sum(student) == (64 // minibatches if not exact else 16 * (minibatches - 1))
    _, expected, same = passes(
        *folders, ReadsBoth(0.5, **full), rollout_engine=engine(), **settings
    )
    assert sum(rows) == 64 // minibatches
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    for ours, theirs in zip(logged, expected, strict=True):
        names = {n for n in theirs if n.startswith(("kd/", "policy/", "loss/"))}
        for name in names:
            assert ours[name] == pytest.approx(theirs[name], nan_ok=True), name
    assert "kd/floored_frac" in logged[0]


def test_whole_distributions_need_no_correction(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    folders = (tmp_path, student_folder, teacher_folder)
    rows, *_ = passes(*folders, GKD(), minibatches_per_rollout=1, rollout_engine=Inexact())
    assert not rows
    for other in (GKD(top_k=4), KDRL(), GKD(ref_kl_coef=0.1), OnPolicyDistillation()):
        assert other.reads_old_scores(rollout(exact=False)), type(other).__name__


def test_a_part_that_reads_a_teacher_has_it_run_before() -> None:
    for objective, reads in (
        (GKD(), False),
        (KDRL(kl_estimator="full_vocabulary"), False),
        (KDRL(kl_estimator="full_vocabulary", engine_correction=TruncatedImportance()), False),
        (KDRL(kl_estimator="full_vocabulary", selection=[Gates(alignment_threshold=1.0)]), True),
        (GRPO(distill=VocabularyKL()), False),
        (GRPO(distill=VocabularyKL(), selection=[Gates(exploration_entropy=1.0)]), True),
        (Own(TokenRatio(), Advantage()), True),
    ):
        assert objective.reads_teacher_scores(rollout()) == reads, objective


def test_replays_need_them(tmp_path: Path, student_folder: str, teacher_folder: str) -> None:
    rows, *_ = passes(tmp_path, student_folder, teacher_folder, GRPO(), epochs_per_rollout=2)
    assert rows == [8, 8]


def test_reading_without_saying_so_is_refused(tmp_path: Path, student_folder: str) -> None:
    class Reader(Advantage):
        def prepare(self, rollout: RolloutBatch) -> torch.Tensor:
            from kdrl_lightning.objectives.base import known

            return known(rollout.old_logprobs, "old_logprobs").sum(1)

    module = make_module(student_folder, None, PolicyObjective(TokenRatio(), Reader()))
    with pytest.raises(ConfigurationError, match=r"declare it with `reads_old_scores`"):
        fit(tmp_path, module, make_data(), max_steps=1)
    module = make_module(student_folder, None, PolicyObjective(TokenRatio(), Peeks()))
    fit(tmp_path, module, make_data(), max_steps=1)


# Rows of one rollout of 16 completions that go through each model: the student before the updates
# and in them, the teacher's log-probabilities and its states, the reference.
PASSES = {
    "kdrl": (KDRL(0.5), 1, 1, (0, 16, 16, 0, 0)),
    "kdrl, two mini-batches": (KDRL(0.5), 2, 1, (8, 16, 16, 0, 0)),
    "kdrl, two epochs": (KDRL(0.5), 1, 2, (16, 32, 16, 0, 0)),
    "full vocabulary": (KDRL(0.5, kl_estimator="full_vocabulary"), 1, 1, (0, 16, 0, 16, 0)),
    "full, two mini-batches": (KDRL(0.5, kl_estimator="full_vocabulary"), 2, 1, (8, 16, 0, 16, 0)),
    "full, two epochs": (KDRL(0.5, kl_estimator="full_vocabulary"), 1, 2, (16, 32, 16, 32, 0)),
    "top k": (KDRL(0.5, kl_estimator="top_k", kd_top_k=4), 1, 1, (16, 16, 16, 0, 0)),
    "rlad": (RLAD(), 1, 1, (0, 16, 16, 0, 0)),
    "grpo": (GRPO(), 2, 1, (8, 16, 0, 0, 0)),
    "reference": (GRPO(ref_kl_coef=0.1), 1, 1, (0, 16, 0, 0, 16)),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("case", PASSES)
def test_each_model_runs_as_often_as_it_must(
    tmp_path: Path, student_folder: str, teacher_folder: str, case: str, accumulate: int
) -> None:
    objective, minibatches, epochs, expected = PASSES[case]
    module = make_module(
        student_folder, teacher_folder if objective.needs_teacher else None, objective
    )
    module.configure_model()
    rows: dict[tuple[str, str], int] = {}

    def count(model: Any, who: str, name: str) -> None:
        run = getattr(model, name)

        def counted(batch: RolloutBatch, *args: Any, **kwargs: Any) -> Any:
            key = who, "update" if torch.is_grad_enabled() and who == "student" else name
            rows[key] = rows.get(key, 0) + len(batch)
            return run(batch, *args, **kwargs)

        setattr(model, name, counted)

    class Count(pl.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            count(module.student, "student", "score")
            for who, model in (("teacher", module.teacher), ("ref", module.frozen.reference)):
                for name in ("score", "states") if model else ():
                    count(model, who, name)

    data = make_data(minibatches_per_rollout=minibatches, epochs_per_rollout=epochs)
    settings = {"max_steps": minibatches * epochs, "accumulate_grad_batches": accumulate}
    fit(tmp_path, module, data, [Count(), SelectiveImitationStats(), WeightSyncCheck()], **settings)
    keys = (
        ("student", "score"),
        ("student", "update"),
        ("teacher", "score"),
        ("teacher", "states"),
        ("ref", "score"),
    )
    assert tuple(rows.get(key, 0) for key in keys) == expected


def test_nothing_is_written_into_a_batch(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    given: list[tuple[RolloutBatch, dict[str, Any]]] = []

    class Keep(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            given.append((batch, copy.deepcopy(vars(batch))))

    module = make_module(student_folder, teacher_folder, GKD())
    fit(tmp_path, module, make_data(), [Keep(), SelectiveImitationStats(), WeightSyncCheck()])
    for batch, before in given:
        assert batch.teacher_logprobs is None
        for name, value in before.items():
            now = getattr(batch, name)
            same = torch.equal(now, value) if isinstance(value, torch.Tensor) else now == value
            assert same, name
    assert {batch.old_logprobs is None for batch, _ in given} == {True, False}
