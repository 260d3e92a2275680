"""The next rollout is sampled while the current one trains."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from helpers.short_runs import Log, Trace, fit, make_data, make_module, make_trainer, some_reward
from kdrl_lightning import GRPO
from kdrl_lightning.callbacks import WeightSyncCheck
from kdrl_lightning.engines import TransformersEngine
from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.objectives import NoCorrection
from kdrl_lightning.rewards import Sample

pytestmark = pytest.mark.filterwarnings("ignore:.* of the (completions|groups) ")


class Elsewhere(TransformersEngine):
    """Samples from a copy of the weights, as a server does, and notes in which thread."""

    supports_async = True
    exact = False

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int | None, bool, int]] = []
        self.pushes: list[int] = []
        self.dies_at: int | None = None
        self.forgets = False
        self._copy: Any = None
        self._busy = False

    def setup(self, weights: Any, eos_token_id: int, pad_token_id: int) -> None:
        self._copy = load_causal_lm(weights.path)
        super().setup(type(weights)(self._copy, weights.path), eos_token_id, pad_token_id)

    def update_weights(self, weights: Any, version: int) -> None:
        assert threading.current_thread() is threading.main_thread() and not self._busy
        if not (self.forgets and self.pushes):
            self._copy.load_state_dict(weights.model.state_dict())
        self.pushes.append(version)
        super().update_weights(type(weights)(self._copy, weights.path), version)

    def generate(self, prompts: Any, seeds: Any, sampling: Any) -> Any:
        beside = threading.current_thread() is not threading.main_thread()
        self.asked.append((self.version, beside, len(prompts)))
        if self.version == self.dies_at and beside:
            raise TrainingStopped("the server http://a must answer")
        if not beside:
            return super().generate(prompts, seeds, sampling)
        self._busy = True
        time.sleep(0.05)  # long enough for a push that does not wait to be caught
        made = super().generate(prompts, seeds, sampling)
        self._busy = False
        return made


def run(tmp_path: Path, folder: str, engine: Any = None, **changes: Any) -> tuple[Any, Any, Log]:
    engine, log = engine or Elsewhere(), Log()
    settings: dict[str, Any] = {"limit_val_batches": 0, **changes.pop("trainer", {})}
    data = make_data(rollout_engine=engine, **{"max_off_policy_steps": 1, **changes})
    module = make_module(folder, None, GRPO())
    return engine, fit(tmp_path, module, data, [WeightSyncCheck(), log], **settings), log


def test_versions_importance_weights_and_pushes(tmp_path: Path, student_folder: str) -> None:
    engine, trace, log = run(tmp_path, student_folder)
    # Four rollouts of two updates: each is from the weights at the start of the one before.
    versions = [set(batch.policy_version.tolist()) for _, batch in trace.seen]
    assert versions == [{0}, {0}, {0}, {0}, {2}, {2}, {4}, {4}]
    assert [row["rollout/staleness"] for row in log.rows][::2] == [0, 2, 2, 2]
    assert engine.pushes == [0, 2, 4]  # nothing is pushed after the last rollout
    assert [v for v, beside, _ in engine.asked if beside] == [0, 2, 4]
    for step, batch in trace.seen:
        real = batch.loss_mask
        ratio = (batch.old_logprobs - batch.rollout_logprobs)[real].exp()
        assert torch.allclose(batch.importance_weights[real], ratio.clamp(max=2.0), atol=1e-5)
        assert (float((ratio - 1).abs().max()) > 1e-3) == (step >= 2)  # staleness is in it


def test_old_logprobs_are_those_of_the_rollouts_first_update(
    tmp_path: Path, student_folder: str
) -> None:
    gaps: list[float] = []

    class Keep(pl.Callback):
        def on_train_batch_end(
            self, trainer: pl.Trainer, module: Any, out: Any, batch: Any, batch_idx: int
        ) -> None:
            gap = (out["logprobs"] - batch.old_logprobs).masked_fill(~batch.loss_mask, 0.0)
            gaps.append(float(gap.abs().max()))

    data = make_data(
        rollout_engine=Elsewhere(),
        max_off_policy_steps=1,
        minibatches_per_rollout=1,
        epochs_per_rollout=2,
    )
    fit(tmp_path, make_module(student_folder, None, GRPO()), data, [Keep()], limit_val_batches=0)
    assert max(gaps[::2]) == 0.0 < min(gaps[1::2])


def test_the_same_completions_as_one_after_another(tmp_path: Path, student_folder: str) -> None:
    """What is sampled follows from weights and seeds, not from the thread."""

    class Frozen(Elsewhere):
        def update_weights(self, weights: Any, version: int) -> None:
            if not self.pushes:
                super().update_weights(weights, version)
            self.version = version

    found = []
    for lag in (0, 1):
        changes = {"max_off_policy_steps": lag, "max_refills": 1, "reward": some_reward}
        data = make_data(rollout_engine=Frozen(), **changes)
        trace = fit(tmp_path, make_module(student_folder, None, GRPO()), data, limit_val_batches=0)
        found.append([batch.completion_ids for _, batch in trace.seen])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_validation_in_between_waits_and_uses_the_newest_weights(
    tmp_path: Path, student_folder: str
) -> None:
    engine, trace, log = run(tmp_path, student_folder, trainer={"limit_val_batches": 1.0})
    # Epochs of two rollouts: after rollout 1, whose successor was begun at step 2.
    assert engine.pushes == [0, 2, 4, 8]
    assert (4, False, 10) in engine.asked and (8, False, 10) in engine.asked
    assert set(trace.seen[4][1].policy_version.tolist()) == {2}
    assert log.rows[4]["rollout/staleness"] == 2


def test_rewards_are_judged_in_the_main_thread(tmp_path: Path, student_folder: str) -> None:
    threads = set()

    def reward(sample: Sample) -> float:
        threads.add(threading.current_thread())
        return some_reward(sample)

    run(tmp_path, student_folder, reward=reward)
    assert threads == {threading.main_thread()}


def test_what_goes_wrong_in_the_thread_stops_the_run_at_the_next_rollout(
    tmp_path: Path, student_folder: str
) -> None:
    for validates in (0, 1.0):
        engine = Elsewhere()
        engine.dies_at = 2
        with pytest.raises(TrainingStopped, match="the server http://a must answer"):
            run(tmp_path, student_folder, engine, trainer={"limit_val_batches": validates})
        assert engine.pushes[-1] == 2


def test_a_push_that_gets_lost_is_found_by_fresh_completions(
    tmp_path: Path, student_folder: str
) -> None:
    engine = Elsewhere()
    engine.forgets = True
    data = make_data(rollout_engine=engine, max_off_policy_steps=1)
    with pytest.raises(TrainingStopped, match=r"must agree with the trainer's .* at step 4"):
        callbacks = [WeightSyncCheck(every_n_rollouts=2)]
        fit(tmp_path, make_module(student_folder, None, GRPO()), data, callbacks)


def test_completions_that_are_too_old_stop_the_run(tmp_path: Path, student_folder: str) -> None:
    class Late(Elsewhere):
        def update_weights(self, weights: Any, version: int) -> None:
            super().update_weights(weights, 0 if version == 2 else version)

    data = make_data(rollout_engine=Late(), max_off_policy_steps=1)
    module = make_module(student_folder, None, GRPO())
    with pytest.raises(TrainingStopped, match=r"at most 2 optimizer steps old .* got .* 4 optim"):
        fit(tmp_path, module, data, [WeightSyncCheck()], limit_val_batches=0)


def test_a_resume_goes_on_with_a_fresh_rollout(tmp_path: Path, student_folder: str) -> None:
    data = make_data(rollout_engine=Elsewhere(), max_off_policy_steps=1)
    trainer = make_trainer(tmp_path, max_steps=5, limit_val_batches=0)
    trainer.fit(make_module(student_folder, None, GRPO()), datamodule=data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    engine, trace = Elsewhere(), Trace()
    data = make_data(rollout_engine=engine, max_off_policy_steps=1)
    trainer = make_trainer(tmp_path, max_steps=10, callbacks=[trace], limit_val_batches=0)
    module = make_module(student_folder, None, GRPO())
    trainer.fit(module, datamodule=data, ckpt_path=tmp_path / "run.ckpt")
    # The half-used rollout ends as it was; what was sampled ahead of the next is gone.
    versions = [set(batch.policy_version.tolist()) for _, batch in trace.seen]
    assert versions == [{2}, {6}, {6}, {6}, {6}]


def test_what_cannot_work_is_refused(tmp_path: Path, student_folder: str) -> None:
    with pytest.raises(ConfigurationError, match=r"`max_off_policy_steps` must be 0 or 1 .* 2"):
        make_data(max_off_policy_steps=2, rollout_engine=Elsewhere())
    with pytest.raises(ConfigurationError, match=r"1 and TransformersEngine\. Use VLLMServerEng"):
        make_data(max_off_policy_steps=1)
    objective = GRPO(engine_correction=NoCorrection())
    data = make_data(rollout_engine=Elsewhere(), max_off_policy_steps=1)
    with pytest.warns(UserWarning, match=r"NoCorrection with `max_off_policy_steps` 1"):
        fit(tmp_path, make_module(student_folder, None, objective), data, max_steps=1)
    with pytest.raises(ConfigurationError, match=r"`every_n_rollouts` must be at least 1: got 0"):
        WeightSyncCheck(every_n_rollouts=0)
