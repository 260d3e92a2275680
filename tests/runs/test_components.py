"""Lightning's own flags, and details of module, data module and callbacks."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks as pl_callbacks
from lightning.pytorch.loggers import CSVLogger
from torch.optim.lr_scheduler import OneCycleLR

from helpers.short_runs import Log, fit, make_data, make_module, make_trainer
from kdrl_lightning import GRPO, SFT, KDRLModule, SupervisedDataModule
from kdrl_lightning.callbacks import (
    CPUThreads,
    PredictionWriter,
    RolloutProgress,
    RunReport,
    SelectiveImitationStats,
    WeightSyncCheck,
)
from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.tiny import AdditionTraces

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`:UserWarning"),
]


def test_gradient_clip_val_bounds_the_update(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    norms: list[float] = []

    class Norm(pl.Callback):
        def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if grads:
                norms.append(float(torch.nn.utils.get_total_norm(grads)))

    module = make_module(student_folder, teacher_folder)
    fit(tmp_path, module, make_data(), [Norm()], max_steps=3, gradient_clip_val=1e-3)
    assert norms and max(norms) <= 1e-3 * (1 + 1e-5)


def test_warm_up_is_stepped_once_per_optimizer_step(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    rates: list[float] = []

    class Rate(pl.Callback):
        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = make_module(student_folder, teacher_folder)
    module.lr_scheduler_callable = lambda o: torch.optim.lr_scheduler.LinearLR(
        o, start_factor=0.25, total_iters=3
    )
    fit(tmp_path, module, make_data(), [Rate()], max_steps=5, accumulate_grad_batches=2)
    torch.testing.assert_close(
        torch.tensor(rates[::2]), torch.tensor([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    )


def test_supervised_loss_is_the_mean_over_all_tokens_of_a_step(
    tmp_path: Path, student_folder: str
) -> None:
    traces = AdditionTraces(32, digits=2)

    def losses(accumulate: int) -> list[float]:
        module = KDRLModule(student_folder, SFT(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        trainer = make_trainer(
            tmp_path, max_steps=4, accumulate_grad_batches=accumulate, limit_val_batches=0
        )
        values: list[float] = []

        class Keep(pl.Callback):
            def on_train_batch_end(
                self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
            ) -> None:
                if (batch_idx + 1) % accumulate == 0:
                    values.append(float(trainer.callback_metrics["loss/nll"]))

        trainer.callbacks.append(Keep())
        trainer.fit(module, datamodule=SupervisedDataModule(traces, batch_size=8))
        return values

    one = losses(1)
    assert one[-1] < one[0]
    assert losses(4) == pytest.approx(one, rel=1e-5)


def test_progress_is_shown_in_rollouts(
    tmp_path: Path, student_folder: str, teacher_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, make_module(student_folder, teacher_folder), make_data(), [RolloutProgress()])
    shown = capsys.readouterr()
    assert (
        "8 steps = 4 rollouts, each of 4 prompts x 4 completions for 2 optimizer steps" in shown.out
    )
    assert "4/4" in shown.err and "reward=" in shown.err


def test_threads_are_set(tmp_path: Path, student_folder: str, teacher_folder: str) -> None:
    module = make_module(student_folder, teacher_folder)
    fit(tmp_path, module, make_data(), [CPUThreads(2)], max_steps=1)
    assert torch.get_num_threads() == 2
    gpu: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cuda", 0)))
    CPUThreads(1).setup(gpu, module, "fit")
    assert torch.get_num_threads() == 2
    with pytest.raises(ConfigurationError, match="`threads` must be at least 1: got 0"):
        CPUThreads(0)


def test_validate_without_prompts_is_refused(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    module, data = make_module(student_folder, teacher_folder), make_data(val_prompts=None)
    with pytest.raises(ConfigurationError, match="`val_prompts` must be given to validate"):
        make_trainer(tmp_path).validate(module, datamodule=data)


def test_training_without_validation_prompts_works(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    module, data = make_module(student_folder, teacher_folder), make_data(val_prompts=None)
    trace = fit(tmp_path, module, data, max_steps=2)
    assert len(trace.seen) == 2


def test_a_teacher_that_gives_nan_stops_the_run(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    module = make_module(student_folder, teacher_folder)
    module.configure_model()
    assert module.teacher is not None
    next(iter(module.teacher.weights().model.parameters())).data.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(TrainingStopped, match="the teacher's log-probabilities must be finite"):
        fit(tmp_path, module, make_data())


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (pl_callbacks.GradientAccumulationScheduler({0: 1, 1: 2}), "change accumulate_grad_batc"),
        (pl_callbacks.LearningRateFinder(), "search a learning rate: got LearningRateFinder"),
        (pl_callbacks.BatchSizeFinder(), "search a batch size: got BatchSizeFinder. Set `data"),
        (pl_callbacks.BackboneFinetuning(), "freeze parts of the student: got BackboneFinetun"),
        (pl_callbacks.ModelPruning("l1_unstructured"), "replace the student's weights: got Mod"),
        (pl_callbacks.EMAWeightAveraging(), "average the student's weights: got EMAWeightAver"),
        (
            pl_callbacks.StochasticWeightAveraging(swa_lrs=1e-3),
            "average the student's weights: got StochasticWeightAveraging. Average the students",
        ),
    ],
)
def test_callbacks_that_do_not_work_with_rollouts_are_refused(
    tmp_path: Path, student_folder: str, teacher_folder: str, callback: Any, words: str
) -> None:
    module = make_module(student_folder, teacher_folder)
    with pytest.raises(ConfigurationError, match=f"`callbacks` must not {words}"):
        fit(tmp_path, module, make_data(), [callback])


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "words"),
    [
        (torch.optim.LBFGS, None, "`optimizer` must step with .* got LBFGS, which evaluates the l"),
        (torch.optim.SparseAdam, None, "got SparseAdam, whose step raises RuntimeError: SparseAd"),
        (torch.optim.AdamW, lambda o: OneCycleLR(o, 0.1, total_steps=7),
         "`lr_scheduler` must last for `max_steps` 8: got OneCycleLR with total_steps 7. Set its"),
    ],
)  # fmt: skip
def test_an_optimizer_or_schedule_that_would_fail_in_the_run_is_refused_before_it(
    tmp_path: Path, student_folder: str, optimizer: Any, scheduler: Any, words: str
) -> None:
    module = KDRLModule(student_folder, GRPO(), optimizer=optimizer, lr_scheduler=scheduler)
    with pytest.raises(ConfigurationError, match=words):
        fit(tmp_path, module, make_data())


def test_a_schedule_of_just_the_run_is_fine(tmp_path: Path, student_folder: str) -> None:
    schedule = lambda o: OneCycleLR(o, 0.001, total_steps=8)  # noqa: E731
    module = KDRLModule(student_folder, GRPO(), lr_scheduler=schedule)
    fit(tmp_path, module, make_data(), max_steps=8)


def test_wrong_counts_are_refused() -> None:
    for name, value, words in (
        ("prompts_per_rollout", 0, "`prompts_per_rollout` must be at least 1: got 0"),
        ("minibatches_per_rollout", 0, "`minibatches_per_rollout` must be at least 1"),
        ("epochs_per_rollout", 0, "`epochs_per_rollout` must be at least 1"),
        ("max_tokens", 0, "`max_tokens` must be at least 1"),
        ("val_temperature", -1.0, "`evaluation.temperature` must be at least 0"),
        ("seed", -1, "`seed` must be at least 0"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            make_data(**{name: value})
    with pytest.raises(ConfigurationError, match="`max_nonfinite_steps` must be at least 0"):
        KDRLModule("somewhere", GRPO(), max_nonfinite_steps=-1)


def test_parts_that_are_used_too_early_say_so(student_folder: str) -> None:
    module = KDRLModule(student_folder, GRPO())
    with pytest.raises(RuntimeError, match=r"call configure_model\(\) first"):
        module.weights()
    with pytest.raises(TypeError, match="expected an index, got str"):
        make_data().on_after_batch_transfer("row", 0)


def test_one_data_module_serves_several_modules(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    data = make_data(val_prompts=[{"prompt": "1+2="}] * 4, val_temperature=1.0)

    def completions(folder: str) -> list[str]:
        module = make_module(folder, teacher_folder)
        batches = make_trainer(tmp_path).predict(module, datamodule=data) or []
        return [row["completion"] for batch in batches for row in batch]

    assert completions(student_folder) != completions(teacher_folder)
    first = make_module(student_folder, teacher_folder)
    fit(tmp_path, first, data, max_steps=2, limit_val_batches=0)
    assert data.watch.rollouts == 1
    second = make_module(teacher_folder, student_folder)
    trace = fit(tmp_path, second, data, max_steps=2, limit_val_batches=0)
    assert data.watch.rollouts == 1  # a run counts its own
    for _, batch in trace.seen:
        torch.testing.assert_close(batch.rollout_logprobs, batch.old_logprobs, rtol=1e-4, atol=1e-4)


class Interrupted(pl.Callback):
    """Fails once, between two micro-batches of the run's second step."""

    def __init__(self) -> None:
        self.failed = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        if trainer.global_step == 1 and index % 2 and not self.failed:
            self.failed = True
            raise OSError("no more disk")


def test_a_run_that_was_stopped_leaves_nothing_behind_for_the_next(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    def rows(log: Log) -> list[dict[str, float]]:
        return [{n: v for n, v in row.items() if n[:4] not in ("time", "memo", "toke")}
                for row in log.rows]  # fmt: skip

    plan: dict[str, Any] = {"max_steps": 2, "accumulate_grad_batches": 2}
    fresh = Log()
    start = make_module(student_folder, teacher_folder)
    fit(tmp_path, start, make_data(), [SelectiveImitationStats(), WeightSyncCheck(), fresh], **plan)
    module, data = make_module(student_folder, teacher_folder), make_data()
    stats, sync, fault = SelectiveImitationStats(), WeightSyncCheck(), Interrupted()
    with pytest.raises(OSError, match="no more disk"):
        fit(tmp_path, module, data, [stats, sync, fault, Log()], **plan)
    assert module.student is not None
    module.student.model.load_state_dict(load_causal_lm(student_folder).state_dict())
    again = Log()
    fit(tmp_path, module, data, [stats, sync, fault, again], **plan)
    assert rows(again) == rows(fresh)


class Once(pl.Callback):
    """Logs a number in the first of the two steps of the first rollout, or stops there."""

    def __init__(self, stops: bool = False) -> None:
        self.stops = stops

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        if self.stops:
            raise OSError("no more disk")
        if not trainer.global_step:
            pl_module.log_step({"own/once": 1.0})


def test_a_number_stands_in_the_rows_of_its_rollout_alone(
    tmp_path: Path, student_folder: str
) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "log_every_n_steps": 1}
    module, logger = make_module(student_folder, None, GRPO()), CSVLogger(tmp_path, name="log")
    fit(tmp_path, module, make_data(val_prompts=None), [Once()], logger=logger, **settings)
    with open(tmp_path / "log/version_0/metrics.csv") as file:
        assert [row["own/once"] for row in csv.DictReader(file)] == ["1.0", "1.0", "", ""]


def test_a_rollout_that_was_never_compared_is_forgotten(
    tmp_path: Path, student_folder: str
) -> None:
    sync, module = WeightSyncCheck(), make_module(student_folder, None, GRPO())
    with pytest.raises(OSError, match="no more disk"):
        fit(tmp_path, module, make_data(), [sync, Once(stops=True)])
    nobody: Any = None
    assert sync._waiting is not None  # it waits for the trainer's own scores
    sync.setup(nobody, nobody, "fit")
    sync.on_before_backward(nobody, nobody, nobody)  # nothing to compare


def test_a_second_run_does_not_repeat_the_numbers_of_the_first(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    module, data, folder = make_module(student_folder, teacher_folder), make_data(), tmp_path
    stats = [SelectiveImitationStats()]
    for callbacks, name in ((stats, "first"), ([], "second")):
        logger = CSVLogger(folder, name=name)
        fit(folder, module, data, callbacks, max_steps=2, logger=logger, log_every_n_steps=1)
    text = [(folder / n / "version_0/metrics.csv").read_text() for n in ("first", "second")]
    assert ["kd/imitation_frac" in t for t in text] == [True, False]
    assert all("loss/total" in t for t in text)


def test_a_schedule_that_ends_before_the_run_is_noticed(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    module = make_module(student_folder, teacher_folder)
    module.lr_scheduler_callable = lambda o: torch.optim.lr_scheduler.LinearLR(
        o, start_factor=1.0, end_factor=0.0, total_iters=2
    )
    with pytest.warns(UserWarning, match="the learning rate is 0 from step 2 on"):
        fit(tmp_path, module, make_data(), max_steps=4)


def test_predictions_are_written(tmp_path: Path, student_folder: str, teacher_folder: str) -> None:
    import json

    module = make_module(student_folder, teacher_folder)
    make_trainer(tmp_path, callbacks=[PredictionWriter()]).predict(module, datamodule=make_data())
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 10
    assert {"prompt", "completion", "reward", "correct"} <= set(json.loads(lines[0]))


def test_fast_dev_run_writes_nothing(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    module = make_module(student_folder, teacher_folder)
    fit(tmp_path, module, make_data(), [RunReport()], fast_dev_run=1)
    assert not list(tmp_path.iterdir())
