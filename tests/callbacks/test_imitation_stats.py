"""Selective-imitation statistics on tiny cases counted by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.fake_module import FakeModule
from helpers.reference import close, f64
from kdrl_lightning.callbacks import SelectiveImitationStats
from kdrl_lightning.callbacks.reports.token_stats import MicroBatch, add_imitation_stats
from kdrl_lightning.metrics import StepStats
from kdrl_lightning.objectives import GRPO, KDRL, RLAD, SFT, Objective, OnPolicyDistillation
from kdrl_lightning.rollout_batch import RolloutBatch, collate

# Completion 0: correct, A = 1, four tokens. Completion 1: wrong, A = -2, two tokens and padding.
# Completion 2: wrong, A = 0, one token.
RATIO = [[1.0, 1.3, 0.7, 1.1], [0.7, 1.5, 9.0, 9.0], [1.25, 9.0, 9.0, 9.0]]
# log pi - log pi_T of the current student
GAP = [[0.5, 0.25, 0.1, -2.0], [-1.0, 0.25, 9.0, 9.0], [0.3, 9.0, 9.0, 9.0]]
TOKENS = 7


def case(**changes: Any) -> tuple[RolloutBatch, Tensor]:
    batch = collate(
        [[1]] * 3, [[1] * 4, [1] * 2, [1]], [0, 0, 0], pad_id=0, correct=[True, False, False]
    )
    logprobs = torch.full((3, 4), -3.0, dtype=torch.float64)
    batch = batch.replace(
        old_logprobs=logprobs - f64(RATIO).log(),
        rollout_logprobs=logprobs - f64(RATIO).log(),
        teacher_logprobs=logprobs - f64(GAP),
        advantages=f64([1.0, -2.0, 0.0]),
        imitation_mask=batch.loss_mask,
        totals=batch.count(4),
    )
    return batch.replace(**changes), logprobs


def stats_of(objective: Objective, batch: RolloutBatch, logprobs: Tensor) -> dict[str, float]:
    stats = StepStats()
    add_imitation_stats(stats, MicroBatch(objective, batch, logprobs))
    return stats.compute()


def check(got: dict[str, float], expected: dict[str, float]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        close(got[name], value)


TEACHER = {
    "kd/reverse_kl": (0.5 + 0.25 + 0.1 - 2.0 - 1.0 + 0.25 + 0.3) / TOKENS,
    "kd/reverse_kl_correct": (0.5 + 0.25 + 0.1 - 2.0) / 4,
    "kd/reverse_kl_wrong": (-1.0 + 0.25 + 0.3) / 3,
    # Rewarded but disliked: .5, .25, .1. Punished but liked: -1. Six tokens have an advantage.
    "kd/conflict_frac": 4 / 6,
    "kd/strong_conflict_frac": 1 / 6,  # -1: more than a factor of two
}


def k3_mean(gaps: list[float]) -> float:
    return sum(math.exp(-g) - 1 + g for g in gaps) / len(gaps)


WRONG = GAP[1][:2] + GAP[2][:1]
TEACHER |= {
    "kd/reverse_kl_k3": k3_mean(GAP[0] + WRONG),
    "kd/reverse_kl_k3_correct": k3_mean(GAP[0]),
    "kd/reverse_kl_k3_wrong": k3_mean(WRONG),
}
NOTHING = {"kd/imitation_frac": 0.0, "kd/imitated_completions_frac": 0.0}
CLIPPED = {
    "policy/ratio_mean": (1.0 + 1.3 + 0.7 + 1.1 + 0.7 + 1.5 + 1.25) / TOKENS,
    "policy/ratio_max": 1.5,
    "policy/clip_frac": 5 / TOKENS,  # 1.3, .7; .7, 1.5; 1.25
    "policy/clip_frac_low": 2 / TOKENS,
    "policy/clip_frac_high": 3 / TOKENS,
    "kd/dead_frac_pos": 1 / 4,  # 1.3
    "kd/dead_frac_neg": 1 / 2,  # .7
    "kd/rewarded_tokens": 3,
    "kd/dead_tokens": 1,
    "kd/punished_tokens": 1,
    "kd/protected_tokens": 1,
}


def test_grpo() -> None:
    check(stats_of(GRPO(), *case()), {**NOTHING, **CLIPPED, **TEACHER})


def test_grpo_without_teacher() -> None:
    got = stats_of(GRPO(), *case(teacher_logprobs=None))
    check(got, {**NOTHING, **CLIPPED})


def test_asymmetric_clip() -> None:
    got = stats_of(GRPO(clip_low=0.4, clip_high=0.27), *case())
    close(got["policy/clip_frac"], 2 / TOKENS)  # 1.3, 1.5
    assert (got["kd/dead_frac_pos"], got["kd/dead_frac_neg"]) == (0.25, 0.0)


def test_kdrl() -> None:
    batch, logprobs = case()
    mask = batch.loss_mask.clone()
    mask[0, :3] = False
    mask[1, 3] = True  # padding does not count, whatever the decision says
    got = stats_of(KDRL(), batch.replace(imitation_mask=mask), logprobs)
    check(
        got,
        {
            "kd/imitation_frac": 4 / TOKENS,
            "kd/imitated_completions_frac": 1.0,
            **CLIPPED,
            **TEACHER,
        },
    )


@pytest.mark.parametrize("make", [KDRL, OnPolicyDistillation])
def test_no_imitation_without_coefficient(make: Any) -> None:
    assert stats_of(make(teacher_kl_coef=0.0), *case())["kd/imitation_frac"] == 0.0
    assert stats_of(make(), *case())["kd/imitation_frac"] == 1.0


def test_distillation_clips_nothing() -> None:
    got = stats_of(OnPolicyDistillation(), *case(advantages=None))
    expected = {
        "kd/imitation_frac": 1.0,
        "kd/imitated_completions_frac": 1.0,
        **{k: v for k, v in CLIPPED.items() if "ratio" in k},
        **{k: v for k, v in TEACHER.items() if "conflict" not in k},
    }
    check(got, expected)


def test_rlad() -> None:
    batch, logprobs = case()
    got = stats_of(RLAD(offset_clamp=1.0), batch, logprobs)
    # Offset o = log pi_old - log pi_T = gap - log rho; cut to 1 in size; r = rho e^(o/2).
    offsets = [
        g - math.log(r) for g, r in zip(GAP[0] + GAP[1][:2] + GAP[2][:1], rhos(), strict=True)
    ]
    clamped = [abs(o) > 1 for o in offsets]
    assert clamped == [False, False, False, True, False, False, False]
    ratios = [
        r * math.exp(min(max(o, -1.0), 1.0) / 2) for r, o in zip(rhos(), offsets, strict=True)
    ]
    # 1.284, 1.292, .880, .667 | .507, 1.388 | 1.299: fences at .8 and 1.2.
    expected = {
        "policy/ratio_mean": sum(ratios) / TOKENS,
        "policy/ratio_max": ratios[5],
        "policy/clip_frac": 6 / TOKENS,  # all but .880
        "policy/clip_frac_low": 2 / TOKENS,  # .667, .507
        "policy/clip_frac_high": 4 / TOKENS,
        "kd/dead_frac_pos": 2 / 4,  # 1.284, 1.292
        "kd/dead_frac_neg": 1 / 2,  # .507
        "kd/rewarded_tokens": 2,
        "kd/dead_tokens": 2,
        "kd/punished_tokens": 1,
        "kd/protected_tokens": 1,
        "kd/imitation_frac": 3 / TOKENS,  # .880, .667; 1.388; A = 0 does not count
        "kd/imitated_completions_frac": 2 / 3,
        "kd/offset_clamp_frac": 1 / TOKENS,
        "kd/offset_weight_max": max(math.exp(min(max(o, -1.0), 1.0) / 2) for o in offsets),
        **TEACHER,
    }
    check(got, expected)


def rhos() -> list[float]:
    return RATIO[0] + RATIO[1][:2] + RATIO[2][:1]


def test_rlad_with_alpha_one_imitates_nothing() -> None:
    got = stats_of(RLAD(trrd_alpha=1.0), *case())
    assert got["kd/imitation_frac"] == 0.0
    check({k: got[k] for k in CLIPPED}, CLIPPED)


def test_a_clamp_counts_where_it_acts() -> None:
    batch, logprobs = case()
    keep = batch.loss_mask.clone()
    assert stats_of(RLAD(), batch, logprobs)["kd/offset_clamp_frac"] == 1 / TOKENS
    keep[0, 3] = False  # the token whose offset is clamped is not imitated
    unselected = batch.replace(imitation_mask=keep)
    assert stats_of(RLAD(), unselected, logprobs)["kd/offset_clamp_frac"] == 0.0
    assert stats_of(RLAD(trrd_alpha=1.0), batch, logprobs)["kd/offset_clamp_frac"] == 0.0


def test_rlad_without_clamp_reports_no_clamp() -> None:
    assert "kd/offset_clamp_frac" not in stats_of(RLAD(log_ratio_clamp=None), *case())


@pytest.mark.parametrize("make", [GRPO, KDRL, RLAD])
def test_dead_tokens_are_those_without_policy_gradient(make: Any) -> None:
    batch, logprobs = case()
    leaf = logprobs.clone().requires_grad_()
    policy = next(iter(make().terms(batch, SimpleNamespace(logprobs=leaf)))).per_token
    (gradient,) = torch.autograd.grad(policy.sum(), leaf)
    got = stats_of(make(), batch, logprobs)
    dead = (gradient == 0) & batch.loss_mask
    close(got["kd/dead_frac_pos"], dead[0].sum() / 4)
    close(got["kd/dead_frac_neg"], dead[1].sum() / 2)


def test_advantages_per_token_count_like_those_per_completion() -> None:
    batch, logprobs = case()
    spread = batch.replace(advantages=batch.advantages[:, None].expand(3, 4))
    for objective in (GRPO(), KDRL(), RLAD()):
        assert stats_of(objective, spread, logprobs) == stats_of(objective, batch, logprobs)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_padding_does_not_count(garbage: float) -> None:
    batch, logprobs = case()
    for objective in (GRPO(), KDRL(), RLAD()):
        clean = stats_of(objective, batch, logprobs)
        spoilt = batch.replace(
            old_logprobs=batch.old_logprobs.masked_fill(~batch.loss_mask, garbage),
            teacher_logprobs=batch.teacher_logprobs.masked_fill(~batch.loss_mask, garbage),
        )
        assert stats_of(objective, spoilt, logprobs) == clean


def test_micro_batches_add_up_to_the_step() -> None:
    batch, logprobs = case()
    for objective in (GRPO(), KDRL(), RLAD(), OnPolicyDistillation()):
        stats = StepStats()
        for rows in ([0], [1, 2]):
            part = batch.select(rows)
            width = part.loss_mask.shape[1]
            add_imitation_stats(stats, MicroBatch(objective, part, logprobs[rows][:, :width]))
        check(stats.compute(), stats_of(objective, batch, logprobs))


def test_callback_logs_once_per_step() -> None:
    batch, logprobs = case()
    trainer: Any = SimpleNamespace(
        accumulate_grad_batches=2,
        num_training_batches=4,
        global_step=1,
        loggers=[],
        datamodule=None,
    )
    module, callback = FakeModule(KDRL()), SelectiveImitationStats()
    for index in range(4):
        rows = [0] if index % 2 == 0 else [1, 2]
        part = batch.select(rows)
        now = logprobs[rows][:, : part.loss_mask.shape[1]]
        outputs = {"logprobs": now, "entropy": -now}
        callback.on_train_batch_end(trainer, module, outputs, part, index)
        assert len(module.logged) == (index + 1) // 2
    for values in module.logged:
        # One group, whose completions lie in two micro-batches.
        check(values, {**stats_of(KDRL(), batch, logprobs), "kd/imitated_groups_frac": 1.0})


def test_callback_is_silent_on_given_completions() -> None:
    batch, logprobs = case(old_logprobs=None, rollout_logprobs=None)
    trainer: Any = SimpleNamespace(accumulate_grad_batches=1)
    module = FakeModule(SFT())
    SelectiveImitationStats().on_train_batch_end(trainer, module, {"logprobs": logprobs}, batch, 0)
    assert module.logged == []


def test_a_clamp_of_zero_leaves_the_teacher_out_of_the_ratio() -> None:
    got = stats_of(RLAD(offset_clamp=0.0), *case())
    assert got["kd/imitation_frac"] == 0.0
    check({k: got[k] for k in CLIPPED}, CLIPPED)
    assert "kd/offset_weight_max" not in got


@pytest.mark.parametrize("make", [GRPO, KDRL, RLAD])
def test_a_ratio_on_the_fence_is_inside_and_alive(make: Any) -> None:
    batch, logprobs = case()
    ratio = f64([[0.5, 2.0, 1.0, 1.0], [0.5, 2.0, 1.0, 1.0], [1.0] * 4])
    logprobs = torch.zeros_like(logprobs)  # so that no difference is rounded
    old = -ratio.log()
    batch = batch.replace(old_logprobs=old, teacher_logprobs=old)  # TRRD's ratio is rho, too
    objective = make(clip_low=0.5, clip_high=1.0)
    got = stats_of(objective, batch, logprobs)
    names = ("policy/clip_frac", "policy/clip_frac_low", "policy/clip_frac_high")
    assert [got[n] for n in (*names, "kd/dead_frac_pos", "kd/dead_frac_neg")] == [0.0] * 5
    leaf = logprobs.clone().requires_grad_()
    policy = next(iter(objective.terms(batch, SimpleNamespace(logprobs=leaf)))).per_token
    (gradient,) = torch.autograd.grad(policy.sum(), leaf)
    assert gradient[0].ne(0).all() and gradient[1, :2].ne(0).all()


def test_agreement_is_that_of_the_present_student() -> None:
    batch, logprobs = case()
    theirs = torch.tensor([[3, 4, 5, 6], [3, 4, 9, 9], [3, 9, 9, 9]])
    then = torch.where(torch.tensor([[True, False, False, False]]), theirs, 8)
    batch = batch.replace(teacher_top_ids=theirs, topk_ids=then[..., None])
    now = torch.where(theirs == 3, 7, theirs)
    for top_ids, expected in ((None, 3 / TOKENS), (now, 4 / TOKENS)):
        stats = StepStats()
        add_imitation_stats(stats, MicroBatch(GRPO(), batch, logprobs, top_ids))
        close(stats.compute()["kd/top_token_agreement"], expected)


def test_what_has_nothing_to_average_is_a_gap() -> None:
    batch, logprobs = case()
    module, callback = FakeModule(RLAD()), SelectiveImitationStats()
    trainer: Any = SimpleNamespace(
        accumulate_grad_batches=1,
        num_training_batches=4,
        global_step=1,
        loggers=[],
        datamodule=None,
    )
    nothing = batch.loss_mask & False
    for part in (batch, batch.replace(loss_mask=nothing, imitation_mask=nothing)):
        callback.on_train_batch_end(
            trainer, module, {"logprobs": logprobs, "entropy": -logprobs}, part, 0
        )
    full, empty = module.logged
    assert None not in full.values()
    assert empty.keys() == full.keys()
    counts = {f"kd/{fate}_tokens" for fate in ("rewarded", "dead", "punished", "protected")}
    assert {empty[name] for name in counts} == {0.0}  # a number of nothing is known
    assert {value for name, value in empty.items() if name not in counts} == {None}
    assert callback.rows[1] == {"rollout": 1, **dict.fromkeys(counts, 0.0)}
