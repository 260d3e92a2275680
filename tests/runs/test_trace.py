"""The flow of a run on CPU: what is sampled when, what is trained, what is saved."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from helpers.short_runs import Log, ScoredBefore, fit, make_data, make_module, make_trainer
from kdrl_lightning import GRPO, KDRL, RLAD, KDRLModule, LocalTeacher
from kdrl_lightning.callbacks import (
    KLCoefficientAnnealing,
    RunReport,
    SelectiveImitationStats,
    WeightSyncCheck,
)
from kdrl_lightning.engines import TransformersEngine
from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.objectives import Objective, Term

# A random model stops late and is rarely right.
pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")


def test_rollouts_come_from_the_weights_of_their_first_update(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    data = make_data(epochs_per_rollout=2)  # 4 updates per rollout
    trace = fit(tmp_path, make_module(student_folder, teacher_folder), data, [WeightSyncCheck()])
    steps = [step for step, _ in trace.seen]
    assert steps == list(range(8))
    for step, batch in trace.seen:
        assert (batch.policy_version == step // 4 * 4).all()


@pytest.mark.parametrize("objective", [RLAD(), ScoredBefore()], ids=lambda o: type(o).__name__)
def test_old_logprobs_equal_the_first_updates_bit_for_bit(
    tmp_path: Path, student_folder: str, teacher_folder: str, objective: RLAD
) -> None:
    ratios = []

    class Ratio(pl.Callback):
        def on_train_batch_end(
            self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            assert (batch.old_logprobs is None) == (type(objective) is RLAD)
            old = pl_module.completed(batch).old_logprobs
            ratios.append((outputs["logprobs"] - old).abs().max().item())

    module = make_module(student_folder, teacher_folder, objective)
    fit(tmp_path, module, make_data(minibatches_per_rollout=1), [Ratio()], max_steps=3)
    assert ratios == [0.0, 0.0, 0.0]


def test_engine_and_trainer_agree_on_logprobs(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    module = make_module(student_folder, teacher_folder)
    trace = fit(tmp_path, module, make_data(temperature=0.7), max_steps=4)
    for _, batch in trace.seen:
        torch.testing.assert_close(batch.rollout_logprobs, batch.old_logprobs, rtol=1e-4, atol=1e-4)


def test_minibatches_are_disjoint_whole_groups_and_epochs_replay_them(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    module = make_module(student_folder, teacher_folder)
    trace = fit(tmp_path, module, make_data(epochs_per_rollout=2), max_steps=4)
    groups = [set(batch.group_ids.tolist()) for _, batch in trace.seen]
    assert groups == [{0, 1}, {2, 3}, {0, 1}, {2, 3}]
    assert all(len(batch) == 8 for _, batch in trace.seen)


def test_every_update_changes_the_student_and_nothing_changes_the_teacher(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    module = make_module(student_folder, teacher_folder, KDRL(teacher_kl_coef=0.5))
    module.configure_model()
    before = {k: v.clone() for k, v in module.weights().named_tensors()}
    assert isinstance(module.teacher, LocalTeacher)
    frozen = {k: v.clone() for k, v in module.teacher.weights().named_tensors()}
    fit(tmp_path, module, make_data(), max_steps=1)
    changed = [k for k, v in module.weights().named_tensors() if not torch.equal(v, before[k])]
    assert len(changed) == len(before)
    for name, value in module.teacher.weights().named_tensors():
        assert torch.equal(value, frozen[name]) and not value.requires_grad


def test_the_teacher_is_no_part_of_parameters_optimizer_or_checkpoint(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    module = make_module(student_folder, teacher_folder)
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(module, datamodule=make_data())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    student = {id(p) for p in module.student.model.parameters()}  # type: ignore[union-attr]
    assert {id(p) for p in module.parameters()} == student
    groups = trainer.optimizers[0].param_groups
    assert {id(p) for g in groups for p in g["params"]} == student
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert all(name.startswith("student.") for name in saved["state_dict"])
    assert len(saved["state_dict"]) == len(module.student.state_dict())  # type: ignore[union-attr]


def test_no_rollout_is_made_ahead_or_twice(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    data = make_data()
    module = make_module(student_folder, teacher_folder)
    fit(tmp_path, module, data, max_steps=8, limit_val_batches=0)
    assert data.watch.rollouts == 4
    assert data.rollout_engine.version == 6  # the last rollout began after six updates


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_accumulation_does_not_change_the_run(
    tmp_path: Path, student_folder: str, teacher_folder: str, accumulate: int
) -> None:
    def weights(n: int) -> list[torch.Tensor]:
        module = make_module(student_folder, teacher_folder, KDRL(teacher_kl_coef=0.5))
        # Adam would divide by the gradient's size, which magnifies the rounding of small entries.
        module.optimizer_callable = lambda p: torch.optim.SGD(p, lr=1e-2)
        trainer = make_trainer(
            tmp_path, max_steps=2, accumulate_grad_batches=n, precision="64-true"
        )
        trainer.fit(module, datamodule=make_data())
        return [v.clone() for _, v in module.weights().named_tensors()]

    for ours, theirs in zip(weights(accumulate), weights(1), strict=True):
        assert ours.dtype == torch.float64
        # Qwen2's RMSNorm rounds to float32 inside, so the second step is equal only to that.
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("objective", [GRPO(), KDRL(0.3), RLAD(), RLAD(reduction="sequence_mean")])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batches_leave_the_gradient_of_a_step_unchanged(
    tmp_path: Path, student_folder: str, teacher_folder: str, objective: Objective, parts: int
) -> None:
    def gradient(accumulate: int) -> torch.Tensor:
        grads: list[torch.Tensor] = []

        class Keep(pl.Callback):
            def on_before_optimizer_step(
                self, trainer: pl.Trainer, pl_module: Any, optimizer: Any
            ) -> None:
                grads.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).clone())

        module = make_module(student_folder, teacher_folder, objective, "float64")
        fit(
            tmp_path,
            module,
            make_data(),
            [Keep()],
            max_steps=1,
            accumulate_grad_batches=accumulate,
            precision="64-true",
        )
        return grads[0]

    whole = gradient(1)
    gap = (gradient(parts) - whole).norm() / whole.norm()
    assert whole.norm() > 0 and gap < 1e-10


def test_completions_do_not_depend_on_how_a_rollout_is_batched(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    def completions(accumulate: int) -> list[tuple[int, ...]]:
        module = make_module(student_folder, teacher_folder)
        trace = fit(tmp_path, module, make_data(), max_steps=1, accumulate_grad_batches=accumulate)
        return sorted(
            tuple(row[mask].tolist())
            for _, b in trace.seen
            for row, mask in zip(b.completion_ids, b.completion_mask, strict=True)
        )

    assert completions(1) == completions(4)


def test_runs_repeat_exactly_and_the_seed_changes_them(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    def weights(seed: int) -> torch.Tensor:
        module = make_module(student_folder, teacher_folder)
        fit(tmp_path, module, make_data(seed=seed), max_steps=4)
        return torch.cat([v.flatten() for _, v in module.weights().named_tensors()])

    first = weights(0)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_annealing_sets_the_coefficient_of_each_rollout(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    module = make_module(student_folder, teacher_folder, KDRL(teacher_kl_coef=9.0))
    annealing = KLCoefficientAnnealing(start=1.0, floor=0.5, decrement=0.2)
    trace = fit(tmp_path, module, make_data(), [annealing])
    torch.testing.assert_close(
        torch.tensor(trace.coefs), torch.tensor([1.0, 1.0, 0.8, 0.8, 0.6, 0.6, 0.5, 0.5])
    )


def test_annealing_refuses_an_objective_without_the_coefficient(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    module = make_module(student_folder, teacher_folder, GRPO())
    with pytest.raises(ConfigurationError, match="must be one of GRPO's"):
        fit(tmp_path, module, make_data(), [KLCoefficientAnnealing()])


def test_statistics_are_logged_once_per_step_and_summed_over_micro_batches(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    def metrics(accumulate: int) -> dict[str, float]:
        rows: list[dict[str, float]] = []

        class Last(pl.Callback):
            def on_train_batch_end(
                self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
            ) -> None:
                rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})

        module = make_module(student_folder, teacher_folder)
        fit(
            tmp_path,
            module,
            make_data(),
            [SelectiveImitationStats(), Last()],
            max_steps=1,
            accumulate_grad_batches=accumulate,
        )
        return rows[-1]

    one, four = metrics(1), metrics(4)
    names = [n for n in one if n.startswith(("kd/", "policy/", "loss/", "reward/"))]
    assert {"kd/imitation_frac", "kd/reverse_kl", "policy/entropy", "loss/total"} <= set(names)
    for name in names:
        assert four[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


def test_resume_continues_with_the_next_rollout(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    def weights(module: KDRLModule) -> torch.Tensor:
        return torch.cat([v.flatten() for _, v in module.weights().named_tensors()])

    whole = make_module(student_folder, teacher_folder)
    fit(tmp_path, whole, make_data(), max_steps=8)
    half = make_module(student_folder, teacher_folder)
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.fit(half, datamodule=make_data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    rest = make_module(student_folder, teacher_folder)
    make_trainer(tmp_path, max_steps=8).fit(
        rest, datamodule=make_data(), ckpt_path=str(tmp_path / "half.ckpt")
    )
    assert torch.equal(weights(rest), weights(whole))


def test_a_step_that_is_not_finite_is_skipped_and_repetition_stops(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    class Broken(GRPO):
        def __init__(self, bad_steps: int) -> None:
            super().__init__()
            self.left = bad_steps

        def __call__(self, batch: Any, scores: Any) -> Any:
            loss, terms = super().__call__(batch, scores)
            self.left -= 1
            return (loss * torch.nan if self.left >= 0 else loss), terms

    module = make_module(student_folder, teacher_folder, Broken(3))
    fit(tmp_path, module, make_data(), max_steps=5)
    assert module.skipped_steps == 3
    module = make_module(student_folder, teacher_folder, Broken(9))
    with pytest.raises(TrainingStopped, match=r"not finite for 4 optimizer steps .* at step 3"):
        fit(tmp_path, module, make_data(), max_steps=8)
    start = make_module(student_folder, teacher_folder)
    start.configure_model()
    for (_, ours), (_, theirs) in zip(
        module.weights().named_tensors(), start.weights().named_tensors(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_weight_sync_stops_a_stale_or_lying_engine(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    from kdrl_lightning.engines import Completion, TransformersEngine

    class Stale(TransformersEngine):
        def update_weights(self, weights: Any, version: int) -> None:
            super().update_weights(weights, 0)

    class Lying(TransformersEngine):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            groups = super().generate(*args, **kwargs)
            return [
                [Completion(c.ids, [x - 1.0 for x in c.logprobs], c.truncated) for c in g]
                for g in groups
            ]

    module = make_module(student_folder, teacher_folder)
    with pytest.raises(TrainingStopped, match="2 optimizer steps old at step 2"):
        fit(tmp_path, module, make_data(rollout_engine=Stale()), [WeightSyncCheck()])
    module = make_module(student_folder, teacher_folder)
    with pytest.raises(TrainingStopped, match=r"must agree with the trainer's within 0\.001 nats"):
        fit(tmp_path, module, make_data(rollout_engine=Lying()), [WeightSyncCheck()])


def test_truncated_completions_can_be_left_out_of_the_loss(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    module = make_module(student_folder, teacher_folder)
    trace = fit(tmp_path, module, make_data(mask_truncated=True, max_tokens=6), max_steps=2)
    batches = [batch for _, batch in trace.seen]
    assert any(bool(b.truncated.any()) for b in batches)
    for batch in batches:
        assert not batch.loss_mask[batch.truncated].any()
        assert batch.loss_mask[~batch.truncated].sum() == batch.totals.num_loss_tokens


def test_validate_test_and_predict_sample_from_the_student(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    module, data = make_module(student_folder, teacher_folder), make_data(val_batch_size=4)
    trainer = make_trainer(tmp_path)
    (validated,) = trainer.validate(module, datamodule=data, verbose=False)
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    rows = [row for batch in trainer.predict(module, datamodule=data) or [] for row in batch]
    assert validated["val/accuracy"] == tested["test/accuracy"]
    assert len(rows) == 10
    assert sum(r["correct"] for r in rows) / 10 == pytest.approx(validated["val/accuracy"])
    assert {"prompt", "answer", "completion", "reward", "correct", "truncated"} <= set(rows[0])
    again = data.evaluate(module.weights())
    assert again == pytest.approx(validated["val/accuracy"])


@pytest.mark.usefixtures("pictures")
def test_report_leaves_summary_picture_and_student(
    tmp_path: Path, student_folder: str, teacher_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    from PIL import Image
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = make_module(student_folder, teacher_folder)
    fit(
        tmp_path,
        module,
        make_data(),
        [SelectiveImitationStats(), RunReport()],
        num_sanity_val_steps=-1,
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["method"] == "RLAD"
    assert (summary["rollouts"], summary["optimizer_steps"]) == (4, 8)
    for name in (
        "seed",
        "student_accuracy_before",
        "student_accuracy_after",
        "teacher_accuracy",
        "rollout_seconds",
        "train_seconds",
        "wall_seconds",
        "tokens_per_second",
    ):
        assert isinstance(summary[name], int | float), name
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1100, 704)
    exported = AutoModelForCausalLM.from_pretrained(summary["export_path"])
    for (name, ours), theirs in zip(
        module.weights().named_tensors(), exported.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert AutoTokenizer.from_pretrained(summary["export_path"]).eos_token == "<eos>"
    table = capsys.readouterr().out
    assert "student before" in table and "run folder" in table


def test_bf16_mixed_trains_float32_weights(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    module = make_module(student_folder, teacher_folder)
    trace = fit(
        tmp_path, module, make_data(), [WeightSyncCheck()], max_steps=2, precision="bf16-mixed"
    )
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert trace.seen[0][1].old_logprobs.dtype == torch.float32


def test_sequence_length_and_entropy_bonus_reach_the_loss(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    module = make_module(student_folder, teacher_folder, GRPO(entropy_coef=0.1))
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=make_data())
    values = {k: float(v) for k, v in trainer.callback_metrics.items()}
    assert values["loss/entropy"] == pytest.approx(-values["policy/entropy"], rel=1e-5)
    assert values["loss/total"] == pytest.approx(
        values["loss/policy"] + 0.1 * values["loss/entropy"], rel=1e-5
    )


class NotANumber(GRPO):
    """A loss whose value is NaN, and whose gradient is not."""

    def terms(self, batch: Any, scores: Any) -> Any:
        yield from super().terms(batch, scores)
        yield Term("broken", torch.full_like(scores.logprobs, torch.nan).detach())


def test_a_loss_that_is_not_finite_counts_without_its_gradient(
    tmp_path: Path, student_folder: str
) -> None:
    module, log = make_module(student_folder, None, NotANumber()), Log()
    with pytest.raises(TrainingStopped, match=r"for 4 optimizer steps .*: loss nan, gradient norm"):
        fit(tmp_path, module, make_data(val_prompts=None), [log], max_steps=8)
    assert module.skipped_steps == 4


def test_entropy_is_of_the_tokens_in_the_loss(tmp_path: Path, student_folder: str) -> None:
    class Entropy(pl.Callback):
        def __init__(self) -> None:
            self.pairs: list[tuple[float, float, float]] = []

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
        ) -> None:
            shown = float(trainer.callback_metrics["policy/entropy"])
            masks = (batch.loss_mask, batch.completion_mask)
            self.pairs.append((shown, *(float(outputs["entropy"][m].mean()) for m in masks)))

    seen = Entropy()
    data = make_data(mask_truncated=True, max_tokens=9, val_prompts=None)
    fit(tmp_path, make_module(student_folder, None, GRPO()), data, [seen], max_steps=4)
    assert any(abs(loss - every) > 1e-4 for _, loss, every in seen.pairs)
    for shown, loss, _ in seen.pairs:
        assert shown == pytest.approx(loss, abs=1e-6)


def test_a_mini_batch_without_loss_tokens_leaves_gaps(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    class Long(TransformersEngine):
        """Its last two groups never end."""

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            groups = super().generate(*args, **kwargs)
            cut = [[replace(c, truncated=True) for c in group] for group in groups[2:]]
            return [[replace(c, truncated=False) for c in g] for g in groups[:2]] + cut

    logger = CSVLogger(tmp_path, name="log")
    fit(
        tmp_path,
        make_module(student_folder, teacher_folder, KDRL(0.1)),
        make_data(val_prompts=None, mask_truncated=True, rollout_engine=Long()),
        [SelectiveImitationStats()],
        max_steps=4,
        logger=logger,
        log_every_n_steps=1,
    )
    with open(tmp_path / "log/version_0/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    for name in ("policy/entropy", "kd/imitation_frac", "kd/reverse_kl", "policy/ratio_max"):
        assert [bool(row[name]) for row in rows] == [True, False, True, False], name
    for name in ("reward/mean", "rollout/length_mean", "loss/total"):
        assert all(row[name] for row in rows), name
