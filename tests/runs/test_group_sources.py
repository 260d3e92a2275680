"""Where the completions of a group come from: refills of flat groups, and the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.short_runs import Log, Trace, fit, make_data, make_module, make_trainer

from kdrl_lightning import GKD, GRPO, RLAD, SFT, LocalTeacher
from kdrl_lightning.callbacks import WeightSyncCheck
from kdrl_lightning.losses.advantages import group_relative
from kdrl_lightning.objectives.ratios import BehaviorRatio, ShapedProbability
from kdrl_lightning.rewards import Sample
from kdrl_lightning.rollout_batch import STUDENT, TEACHER, RolloutBatch

# A random model stops late and is rarely right.
pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")

ONE_UPDATE = {"minibatches_per_rollout": 1, "rollouts_per_epoch": 1, "val_prompts": None}


def tokens(batch: RolloutBatch, row: int) -> tuple[int, ...]:
    return tuple(batch.completion_ids[row, batch.completion_mask[row]].tolist())


def prompt(batch: RolloutBatch, row: int) -> tuple[int, ...]:
    return tuple(batch.input_ids[row, : batch.prompt_lengths[row]].tolist())


def picky_reward(sample: Sample) -> float:
    """Prompts of an even answer give equal rewards, the others do not."""
    even = int(sample.row["answer"]) % 2 == 0
    return 0.25 if even else float(sum(sample.ids) % 7)


def groups_of(trace: Trace, step: int = 0) -> dict[int, list[tuple[Any, ...]]]:
    """Per group of a step the sorted (prompt, completion, reward)."""
    out: dict[int, list[tuple[Any, ...]]] = {}
    for at, batch in trace.seen:
        for row in range(len(batch) if at == step else 0):
            key = (prompt(batch, row), tokens(batch, row), float(batch.rewards[row]))
            out.setdefault(int(batch.group_ids[row]), []).append(key)
    return {group: sorted(rows) for group, rows in sorted(out.items())}


def refilled(
    tmp_path: Path, student: str, max_refills: int, accumulate: int = 1, **data: Any
) -> tuple[dict[int, list[tuple[Any, ...]]], dict[str, float]]:
    log = Log()
    trace = fit(
        tmp_path,
        make_module(student, None, GRPO()),
        make_data(reward=picky_reward, max_refills=max_refills, **{**ONE_UPDATE, **data}),
        [log],
        max_steps=1,
        accumulate_grad_batches=accumulate,
    )
    return groups_of(trace), log.rows[0]


def flat(rows: list[tuple[Any, ...]]) -> bool:
    return len({reward for _, _, reward in rows}) == 1


def test_flat_groups_are_replaced_and_the_others_stay(tmp_path: Path, student_folder: str) -> None:
    before, plain = refilled(tmp_path, student_folder, 0, prompts_per_rollout=8)
    after, metrics = refilled(tmp_path, student_folder, 6, prompts_per_rollout=8)
    was_flat = [g for g in before if flat(before[g])]
    assert 0 < len(was_flat) < 8
    assert not any(flat(rows) for rows in after.values())
    assert {len(rows) for rows in after.values()} == {4}
    first_prompts = {rows[0][0] for rows in before.values()}
    for group, rows in after.items():
        if group in was_flat:
            assert rows[0][0] not in first_prompts
        else:
            assert rows == before[group]
    assert len({rows[0][0] for rows in after.values()}) == 8
    assert plain["rollout/refilled_groups"] == 0.0
    assert plain["rollout/flat_group_frac"] == len(was_flat) / 8
    assert metrics["rollout/flat_group_frac"] == 0.0
    assert metrics["rollout/refilled_groups"] >= len(was_flat)


def test_refills_do_not_depend_on_how_a_rollout_is_batched(
    tmp_path: Path, student_folder: str
) -> None:
    whole, _ = refilled(tmp_path, student_folder, 2)
    cut, _ = refilled(tmp_path, student_folder, 2, accumulate=4)
    assert cut == whole


def test_refills_give_up_at_the_limit(tmp_path: Path, student_folder: str) -> None:
    def bored(sample: Sample) -> float:
        return 0.5

    log = Log()
    data = make_data(reward=bored, max_refills=2, **ONE_UPDATE)
    trace = fit(tmp_path, make_module(student_folder, None, GRPO()), data, [log], max_steps=1)
    assert len(groups_of(trace)) == 4
    assert log.rows[0]["rollout/refilled_groups"] == 8.0
    assert data.watch.completions == 3 * 4 * data.rollout.group_size
    kept = sum(int(batch.completion_mask.sum()) for _, batch in trace.seen)
    assert data.watch.tokens > kept
    assert log.rows[0]["rollout/flat_group_frac"] == 1.0


def mixed(
    tmp_path: Path, student: str, teacher: str, objective: Any, steps: int = 1, **changes: Any
) -> tuple[list[RolloutBatch], list[dict[str, float]], Any]:
    settings = {**ONE_UPDATE, "group_size": 3, "teacher_completions": 2, **changes}
    log, module = Log(), make_module(student, teacher, objective)
    trace = fit(tmp_path, module, make_data(**settings), [WeightSyncCheck(), log], max_steps=steps)
    return [batch for _, batch in trace.seen], log.rows, module


def test_the_teacher_adds_completions_to_each_group(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    objective = RLAD(teacher_tokens=BehaviorRatio())
    (batch,), (metrics,), module = mixed(
        tmp_path, student_folder, teacher_folder, objective, teacher_temperature=0.6
    )
    assert len(batch) == 4 * 5
    for group in range(4):
        rows = (batch.group_ids == group).nonzero().squeeze(-1)
        assert sorted(batch.source[rows].tolist()) == [STUDENT] * 3 + [TEACHER] * 2
        assert len({prompt(batch, int(r)) for r in rows}) == 1
        # One group of G + K, whoever sampled.
        expected = group_relative(batch.rewards[rows][None])[0]
        torch.testing.assert_close(batch.advantages[rows], expected)
    # The behavior log-probabilities are the sampler's own, each at its temperature.
    theirs, own = batch.source == TEACHER, batch.source == STUDENT
    teacher = module.teacher.score(batch.replace(temperature=0.6)).logprobs
    torch.testing.assert_close(batch.rollout_logprobs[theirs], teacher[theirs], rtol=0, atol=1e-4)
    torch.testing.assert_close(
        batch.rollout_logprobs[own], batch.old_logprobs[own], rtol=0, atol=1e-4
    )
    far = (batch.rollout_logprobs - batch.old_logprobs)[theirs].abs().max()
    assert far > 0.1, "the teacher is another model at another temperature"
    # Rewards come from the one function.
    lengths = batch.completion_lengths
    torch.testing.assert_close(batch.rewards, (lengths % 2).float())
    for prefix, chosen in (("reward", own), ("teacher", theirs)):
        name = "mean" if prefix == "reward" else "reward_mean"
        assert metrics[f"{prefix}/{name}"] == pytest.approx(float(batch.rewards[chosen].mean()))
        assert metrics[f"{prefix}/correct_frac"] == pytest.approx(
            float(batch.correct[chosen].float().mean())
        )
    assert metrics["teacher/length_mean"] == pytest.approx(float(lengths[theirs].float().mean()))
    assert metrics["rollout/length_mean"] == pytest.approx(float(lengths[own].float().mean()))
    assert metrics["rollout/mismatch_kl"] < 1e-6
    assert metrics["rollout/logprob_diff_max"] < 1e-4
    assert metrics["time/teacher_s"] > 0.0


def test_the_teachers_temperature_is_the_students_by_default(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    objective = GRPO(teacher_tokens=ShapedProbability())
    (batch,), _, module = mixed(
        tmp_path, student_folder, teacher_folder, objective, temperature=0.8
    )
    theirs = batch.source == TEACHER
    torch.testing.assert_close(
        batch.rollout_logprobs[theirs], batch.teacher_logprobs[theirs], rtol=0, atol=1e-4
    )
    assert module.teacher_seconds > 0.0


def test_teacher_completions_leave_the_students_noise_alone(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    def own(**changes: Any) -> list[tuple[Any, ...]]:
        objective = GRPO(teacher_tokens=ShapedProbability()) if not changes else GRPO()
        (batch,), _, _ = mixed(tmp_path, student_folder, teacher_folder, objective, **changes)
        rows = (batch.source == STUDENT).nonzero().squeeze(-1).tolist()
        return sorted((int(batch.group_ids[r]), prompt(batch, r), tokens(batch, r)) for r in rows)

    assert own() == own(teacher_completions=0)


def test_teacher_and_student_draw_different_noise(tmp_path: Path, student_folder: str) -> None:
    objective = GRPO(teacher_tokens=ShapedProbability())
    (batch,), _, _ = mixed(
        tmp_path, student_folder, student_folder, objective, group_size=2, max_tokens=20
    )
    own = {tokens(batch, r) for r in range(len(batch)) if batch.source[r] == STUDENT}
    theirs = {tokens(batch, r) for r in range(len(batch)) if batch.source[r] == TEACHER}
    long = {t for t in own if len(t) > 5}  # short ones may be equal by chance
    assert long and long.isdisjoint(theirs)


def test_each_rollout_has_new_teacher_completions_from_the_same_weights(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    batches, _, _ = mixed(
        tmp_path,
        student_folder,
        teacher_folder,
        SFT(),
        steps=3,
        group_size=0,
        rollouts_per_epoch=3,
        train_prompts=[{"prompt": "1234+5678=", "answer": "06912"}],
        prompts_per_rollout=2,
    )
    seen = [{tokens(b, r) for r in range(len(b))} for b in batches]
    assert len(seen) == 3 and seen[0].isdisjoint(seen[1]) and seen[1].isdisjoint(seen[2])
    for batch in batches:
        torch.testing.assert_close(
            batch.rollout_logprobs, batch.teacher_logprobs, rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("only_correct", [False, True])
def test_the_teacher_alone_is_supervised_fine_tuning(
    tmp_path: Path, student_folder: str, teacher_folder: str, only_correct: bool
) -> None:
    batches, rows, _ = mixed(
        tmp_path, student_folder, teacher_folder, SFT(only_correct), group_size=0
    )
    (batch,), (metrics,) = batches, rows
    assert len(batch) == 4 * 2 and (batch.source == TEACHER).all()
    kept = batch.completion_mask & (batch.correct[:, None] | (not only_correct))
    assert torch.equal(batch.loss_mask, kept) and 0 < kept.any(1).sum() <= 8
    nll = -(batch.old_logprobs * kept).sum() / kept.sum()
    assert metrics["loss/total"] == pytest.approx(float(nll), rel=1e-5)
    assert metrics["teacher/reward_mean"] == pytest.approx(float(batch.rewards.mean()))
    assert not {"reward/mean", "reward/correct_frac", "rollout/length_mean"} & set(metrics)


def test_supervised_fine_tuning_learns_the_teachers_completions(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    _, rows, _ = mixed(
        tmp_path,
        student_folder,
        teacher_folder,
        SFT(),
        steps=12,
        group_size=0,
        epochs_per_rollout=12,
    )
    assert rows[-1]["loss/total"] < 0.9 * rows[0]["loss/total"]


def test_a_divergence_takes_completions_of_both(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    (batch,), (metrics,), _ = mixed(tmp_path, student_folder, teacher_folder, GKD())
    assert {STUDENT, TEACHER} == set(batch.source.tolist())
    assert metrics["loss/teacher_kl"] > 0.0


def test_teacher_completions_do_not_depend_on_how_a_rollout_is_batched(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    def seen(accumulate: int) -> dict[int, list[tuple[Any, ...]]]:
        data = make_data(**{**ONE_UPDATE, "group_size": 3, "teacher_completions": 2})
        module = make_module(student_folder, teacher_folder, RLAD(teacher_tokens=BehaviorRatio()))
        trace = fit(tmp_path, module, data, max_steps=1, accumulate_grad_batches=accumulate)
        return groups_of(trace)

    assert seen(1) == seen(4)


def test_another_run_of_the_same_data_module_asks_the_new_teacher(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    data = make_data(**{**ONE_UPDATE, "group_size": 0, "teacher_completions": 2})
    for teacher in (teacher_folder, student_folder):
        module, trace = make_module(student_folder, teacher, SFT()), Trace()
        make_trainer(tmp_path, max_steps=1, callbacks=[trace]).fit(module, datamodule=data)
        batch = trace.seen[0][1]
        assert isinstance(module.teacher, LocalTeacher)
        torch.testing.assert_close(
            batch.rollout_logprobs, batch.teacher_logprobs, rtol=0, atol=1e-4
        )
