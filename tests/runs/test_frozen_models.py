"""The frozen models in a run: the reference, a teacher over the full vocabulary, its floor."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from helpers.short_runs import Log, fit, make_data, make_module, make_trainer
from kdrl_lightning import (
    GKD,
    GOPD,
    GRPO,
    KDRL,
    RLAD,
    KDRLModule,
    LocalTeacher,
    OnPolicyDistillation,
)
from kdrl_lightning.callbacks import CoefficientSchedule, SelectiveImitationStats
from kdrl_lightning.callbacks.schedules import Linear, Switch
from kdrl_lightning.engines import Completion, Sampling, TransformersEngine
from kdrl_lightning.errors import TrainingStopped
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.objectives import Objective
from kdrl_lightning.rollout_batch import RolloutBatch

# A random model stops late and is rarely right.
pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")

SMALL: dict[str, Any] = {"val_prompts": None, "prompts_per_rollout": 2, "temperature": 0.8}


@torch.no_grad()
def full_logprobs(model: Any, batch: RolloutBatch) -> list[Tensor]:
    """Per completion ``[tokens, V]``, one row at a time, from the model's own logits."""
    out = []
    for row in range(len(batch)):
        start, tokens = int(batch.prompt_lengths[row]), int(batch.completion_lengths[row])
        ids = batch.input_ids[row, : start + tokens][None]
        logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : start + tokens - 1]
        out.append((logits / batch.temperature).log_softmax(-1))
    return out


def sampled(logprobs: list[Tensor], batch: RolloutBatch) -> Tensor:
    out = torch.zeros(batch.completion_ids.shape, dtype=logprobs[0].dtype)
    for row, values in enumerate(logprobs):
        ids = batch.completion_ids[row, : len(values), None]
        out[row, : len(values)] = values.gather(-1, ids).squeeze(-1)
    return out


def test_the_reference_is_the_student_before_training(tmp_path: Path, student_folder: str) -> None:
    log = Log()
    module = make_module(student_folder, None, GRPO(ref_kl_coef=0.1))
    trace = fit(tmp_path, module, make_data(**SMALL), [log], max_steps=6)
    start = load_causal_lm(student_folder)
    for step, batch in trace.seen:
        expected = sampled(full_logprobs(start, batch), batch)
        torch.testing.assert_close(batch.ref_logprobs, expected, rtol=0, atol=1e-5)
        if step < 2:  # the first rollout
            assert torch.equal(batch.ref_logprobs, batch.old_logprobs)
        else:
            assert (batch.ref_logprobs - batch.old_logprobs).abs().max() > 1e-3
    assert log.rows[0]["loss/ref_kl"] == 0.0
    assert all(row["loss/ref_kl"] > 1e-9 for row in log.rows[1:])
    for row in log.rows:
        total = row["loss/policy"] + 0.1 * row["loss/ref_kl"]
        assert row["loss/total"] == pytest.approx(total, rel=1e-5, abs=1e-7)


def test_a_configured_reference_takes_the_place_of_the_initial_student(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    """G-OPD's second anchor; an objective that reads none loads none."""
    reference = LocalTeacher(teacher_folder)
    module = KDRLModule(
        student_folder, GOPD(2.0), LocalTeacher(student_folder), reference=reference
    )
    trace = fit(tmp_path, module, make_data(**SMALL), max_steps=2)
    model = load_causal_lm(teacher_folder)
    for _, batch in trace.seen:
        expected = sampled(full_logprobs(model, batch), batch)
        torch.testing.assert_close(batch.ref_logprobs, expected, rtol=0, atol=1e-5)
    unread = KDRLModule(student_folder, GRPO(), reference=LocalTeacher(teacher_folder))
    fit(tmp_path, unread, make_data(**SMALL), max_steps=1)
    assert unread.frozen.reference is None


def test_the_reference_of_a_resumed_run_is_the_same(tmp_path: Path, student_folder: str) -> None:
    trainer = make_trainer(tmp_path, max_steps=4)
    module = make_module(student_folder, None, GRPO(ref_kl_coef=0.1))
    trainer.fit(module, datamodule=make_data(**SMALL))
    file = str(tmp_path / "half.ckpt")
    trainer.save_checkpoint(file)
    assert not any("reference" in name for name in torch.load(file)["state_dict"])
    batches: list[RolloutBatch] = []

    class Keep(pl.Callback):
        def on_before_backward(self, trainer: Any, module: Any, loss: Any) -> None:
            batches[-1] = module.completed(batches[-1])

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            batches.append(batch)

    again = make_module(student_folder, None, GRPO(ref_kl_coef=0.1))
    rest = make_trainer(tmp_path, max_steps=5, callbacks=[Keep()])
    rest.fit(again, datamodule=make_data(**SMALL), ckpt_path=file)
    expected = sampled(full_logprobs(load_causal_lm(student_folder), batches[0]), batches[0])
    torch.testing.assert_close(batches[0].ref_logprobs, expected, rtol=0, atol=1e-5)
    assert (batches[0].ref_logprobs - batches[0].old_logprobs).abs().max() > 1e-3


def test_a_schedule_from_zero_loads_the_reference(tmp_path: Path, student_folder: str) -> None:
    log = Log()
    schedule = CoefficientSchedule("ref_kl_coef", Linear(0.0, 1.0, end_step=2))
    module = make_module(student_folder, None, GRPO())
    trace = fit(tmp_path, module, make_data(**SMALL), [schedule, log], max_steps=6)
    assert all(batch.ref_logprobs is not None for _, batch in trace.seen)
    coefs = [row["policy/ref_kl_coef"] for row in log.rows]
    assert coefs == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    for coef, row in zip(coefs, log.rows, strict=True):
        total = row["loss/policy"] + coef * row["loss/ref_kl"]
        assert row["loss/total"] == pytest.approx(total, rel=1e-5, abs=1e-7)
    assert log.rows[4]["loss/ref_kl"] > 1e-9


def test_nothing_is_loaded_without_need(tmp_path: Path, student_folder: str) -> None:
    schedule = CoefficientSchedule("ref_kl_coef", Switch(0.0, 0.0, at_step=1))
    module = make_module(student_folder, None, GRPO())
    trace = fit(tmp_path, module, make_data(**SMALL), [schedule], max_steps=1)
    assert module.frozen.reference is None and trace.seen[0][1].ref_logprobs is None
    module = make_module(student_folder, None, GRPO(ref_kl_coef=0.1))
    make_trainer(tmp_path).validate(module, datamodule=make_data(), verbose=False)
    assert module.frozen.reference is None


def jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """GKD's divergence, by its definition."""
    p, q = student.exp(), teacher.exp()
    if beta == 0.0:
        return (q * (teacher - student)).sum(-1)
    if beta == 1.0:
        return (p * (student - teacher)).sum(-1)
    mix = (beta * q + (1 - beta) * p).log()
    return beta * (q * (teacher - mix)).sum(-1) + (1 - beta) * (p * (student - mix)).sum(-1)


class Expected(pl.Callback):
    """At each update the mean divergence from full logits of the student as it is then."""

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.values: list[float] = []
        self._sum = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        ours = full_logprobs(pl_module.student.model, batch)
        theirs = full_logprobs(pl_module.teacher.weights().model, batch)
        rows = (jsd(a, b, self.beta) for a, b in zip(ours, theirs, strict=True))
        self._sum += float(sum(row.sum() for row in rows)) / batch.totals.num_loss_tokens
        if (index + 1) % trainer.accumulate_grad_batches == 0:
            self.values.append(self._sum)
            self._sum = 0.0


class Gradients(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).clone())


EXACT = {"max_steps": 4, "precision": "64-true"}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("objective", "beta"),
    [
        (GKD(jsd_beta=0.0), 0.0),
        (GKD(jsd_beta=0.3), 0.3),
        (KDRL(0.5, kl_estimator="full_vocabulary"), 1.0),
        (OnPolicyDistillation(kl_estimator="full_vocabulary"), 1.0),
    ],
    ids=["forward", "jsd", "kdrl", "reverse"],
)
def test_the_divergence_is_that_of_full_logits_in_every_update(
    tmp_path: Path,
    student_folder: str,
    teacher_folder: str,
    objective: Objective,
    beta: float,
    accumulate: int,
) -> None:
    expected, log = Expected(beta), Log()
    module = make_module(student_folder, teacher_folder, objective, "float64")
    data = make_data(**SMALL)
    fit(tmp_path, module, data, [expected, log], accumulate_grad_batches=accumulate, **EXACT)
    got = [row["loss/teacher_kl"] for row in log.rows]
    # Lightning keeps logged values in float32.
    assert got == pytest.approx(expected.values, rel=1e-6)
    assert len(got) == 4 and min(got) > 1e-3


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_all_tokens_as_top_k_are_the_full_vocabulary(
    tmp_path: Path, student_folder: str, teacher_folder: str, beta: float
) -> None:
    def gradient(top_k: int | None, accumulate: int = 1) -> Tensor:
        seen = Gradients()
        module = make_module(student_folder, teacher_folder, GKD(beta, top_k=top_k), "float64")
        fit(
            tmp_path,
            module,
            make_data(**SMALL),
            [seen],
            accumulate_grad_batches=accumulate,
            max_steps=1,
            precision="64-true",
        )
        return seen.seen[0]

    full = gradient(None)
    assert full.norm() > 1e-3
    # The tail bucket of top-k holds about e^-36 instead of nothing.
    assert (gradient(16) - full).norm() < 1e-8 * full.norm()
    assert (gradient(2) - full).norm() > 1e-2 * full.norm()
    assert (gradient(None, accumulate=2) - full).norm() < 1e-10 * full.norm()


def test_a_teacher_that_runs_in_the_update_gets_no_gradient(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    module = make_module(student_folder, teacher_folder, GKD())
    fit(tmp_path, module, make_data(**SMALL), max_steps=3)
    start = load_causal_lm(teacher_folder).state_dict()
    assert isinstance(module.teacher, LocalTeacher)
    for name, parameter in module.teacher.weights().model.named_parameters():
        assert parameter.grad is None and not parameter.requires_grad
        assert torch.equal(parameter, start[name])


class Biased(LocalTeacher):
    """A teacher with something else than a logit for one token."""

    def __init__(self, model: str, value: float) -> None:
        super().__init__(model)
        self.value = value

    def load(self, device: torch.device) -> None:
        super().load(device)
        head = self.weights().model.get_output_embeddings()
        bias = torch.zeros(head.out_features)
        bias[5] = self.value
        head.bias = torch.nn.Parameter(bias, requires_grad=False)


@pytest.mark.parametrize(
    "objective",
    [
        KDRL(0.5),
        KDRL(0.5, kl_estimator="k3"),
        KDRL(0.5, form="reward_shaping"),
        KDRL(0.5, kl_estimator="top_k", kd_top_k=4),
        GKD(0.0),
        GKD(1.0),
        RLAD(log_ratio_clamp=None),
    ],
    ids=lambda o: type(o).__name__,
)
def test_a_token_that_the_teacher_excludes_is_floored(
    tmp_path: Path, student_folder: str, teacher_folder: str, objective: Objective
) -> None:
    log = Log()
    module = make_module(student_folder, Biased(teacher_folder, -torch.inf), objective)
    data = make_data(**SMALL, minibatches_per_rollout=1)
    trace = fit(tmp_path, module, data, [SelectiveImitationStats(), log], fast_dev_run=2)
    for row, (_, batch) in zip(log.rows, trace.seen, strict=True):
        excluded = (batch.completion_ids == 5) & batch.completion_mask
        assert 0 < excluded.sum() < batch.completion_mask.sum()
        assert torch.equal(batch.teacher_logprobs == -30.0, excluded)
        share = float(excluded.sum() / batch.completion_mask.sum())
        assert row["kd/floored_frac"] == pytest.approx(share)
        assert torch.tensor(list(row.values())).isfinite().all()
    assert module.skipped_steps == 0


def test_a_proper_teacher_is_not_floored(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    log = Log()
    fit(tmp_path, make_module(student_folder, teacher_folder), make_data(), [log], max_steps=1)
    assert log.rows[0]["kd/floored_frac"] == 0.0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("objective", [RLAD(), GKD()], ids=lambda o: type(o).__name__)
def test_a_teacher_without_numbers_stops_the_run(
    tmp_path: Path, student_folder: str, teacher_folder: str, objective: Objective, value: float
) -> None:
    module = make_module(student_folder, Biased(teacher_folder, value), objective)
    words = r"the teacher's log-probabilities must be finite: got \d+ NaN or infinite of \d+\."
    with pytest.raises(TrainingStopped, match=words):
        fit(tmp_path, module, make_data(**SMALL))
    start = load_causal_lm(student_folder)
    for (name, ours), theirs in zip(
        module.weights().named_tensors(), start.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_one_that_loses_its_numbers_later_stops_the_run_at_that_update(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    teacher, calls = LocalTeacher(teacher_folder), []
    states = teacher.states

    def broken(batch: RolloutBatch) -> Any:
        calls.append(len(batch))
        found = states(batch)
        return found if len(calls) < 4 else found._replace(hidden=found.hidden * torch.nan)

    teacher.states = broken  # type: ignore[method-assign]
    log, module = Log(), make_module(student_folder, teacher, GKD())
    with pytest.raises(TrainingStopped, match="the teacher's log-probabilities must be finite"):
        fit(tmp_path, module, make_data(**SMALL), [log], accumulate_grad_batches=2)
    # The second of the two micro-batches of the rollout's second update.
    assert (len(calls), len(log.rows), module.trainer.global_step) == (4, 1, 1)
    assert not any(name.startswith("teacher/") for name in log.rows[0])


class Full(TransformersEngine):
    """Gives completions of all the tokens that there may be."""

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[list[int]], sampling: Sampling
    ) -> list[list[Completion]]:
        draw = random.Random(0)
        return [
            [
                Completion(
                    [draw.randrange(3, 16) for _ in range(sampling.max_tokens)], [0.0] * 10, True
                )
                for _ in own
            ]
            for own in seeds
        ]


class Counts(LocalTeacher):
    """Notes how many completions it is given at a time, and may be one that shares no prompts."""

    shares = True

    def score(self, batch: RolloutBatch, topk_ids: Tensor | None = None) -> Any:
        self.asked = [*getattr(self, "asked", []), len(batch)]
        return super().score(batch, topk_ids)

    @property
    def joins(self) -> bool:
        return super().joins and self.shares


@pytest.mark.parametrize(
    ("shares", "limit", "asked"),
    # 16 completions of 10 tokens after 4 prompts of 10, a micro-batch each.
    [(True, None, [16]), (False, None, [4] * 4), (True, 120, [8, 8])],
)
def test_a_teacher_that_shares_prompts_scores_micro_batches_together(
    tmp_path: Path,
    student_folder: str,
    teacher_folder: str,
    shares: bool,
    limit: int | None,
    asked: list[int],
) -> None:
    teacher = Counts(teacher_folder)
    teacher.shares = shares
    module = make_module(student_folder, teacher, KDRL())
    data = make_data(
        val_prompts=None,
        minibatches_per_rollout=1,
        max_tokens_per_micro_batch=limit,
        rollout_engine=Full(),
    )
    trace = fit(tmp_path, module, data, max_steps=1, accumulate_grad_batches=4)
    assert teacher.asked == asked
    model = load_causal_lm(teacher_folder)
    for _, batch in trace.seen:
        expected = sampled(full_logprobs(model, batch), batch)
        torch.testing.assert_close(batch.teacher_logprobs, expected, rtol=0, atol=1e-5)


def test_the_reference_of_a_float64_run_is_float64(tmp_path: Path, student_folder: str) -> None:
    module = make_module(student_folder, None, GRPO(ref_kl_coef=0.1))
    trace = fit(tmp_path, module, make_data(**SMALL), max_steps=1, precision="64-true")
    (_, batch), *_ = trace.seen
    assert batch.ref_logprobs.dtype == torch.float64
    torch.testing.assert_close(batch.ref_logprobs, batch.old_logprobs, rtol=0, atol=1e-12)


def test_the_tail_of_a_teachers_distribution_is_scored(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    module = make_module(student_folder, teacher_folder, GKD(0.0, top_k=2), "float64")
    trace = fit(tmp_path, module, make_data(**SMALL), max_steps=2, precision="64-true")
    for _, batch in trace.seen:
        mass = batch.teacher_topk_logprobs.exp().sum(-1) + batch.teacher_tail_logprobs.exp()
        torch.testing.assert_close(
            mass[batch.completion_mask], torch.ones_like(mass[batch.completion_mask])
        )


def test_agreement_follows_the_updates(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    class Compare(pl.Callback):
        def __init__(self) -> None:
            self.gaps: list[tuple[float, float]] = []

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
        ) -> None:
            mask = batch.loss_mask
            same = (outputs["top_ids"] == batch.teacher_top_ids)[mask].float().mean()
            now = float(trainer.callback_metrics["kd/top_token_agreement"])
            assert now == pytest.approx(float(same), abs=1e-6)
            moved = (outputs["top_ids"] != batch.topk_ids[..., 0])[mask]
            self.gaps.append((now, float(moved.float().mean())))

    module = make_module(student_folder, teacher_folder, KDRL(5.0))
    module.optimizer_callable = lambda p: torch.optim.AdamW(p, lr=0.02)
    compare = Compare()
    data = make_data(**SMALL, epochs_per_rollout=3)
    fit(tmp_path, module, data, [SelectiveImitationStats(), compare], max_steps=6)
    assert compare.gaps[0][1] == 0.0 < compare.gaps[-1][1]
