"""What a resumed run takes from its configuration, and which checkpoints it refuses."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.optim.lr_scheduler import (
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from helpers.resumed_runs import Rates, Setting, run, same_weights
from helpers.short_runs import Log, make_data, make_module, make_trainer
from kdrl_lightning import GRPO, KDRL, RLAD
from kdrl_lightning.checkpoints.resume import KEY
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.tiny.models import Recipe, save_untrained
from kdrl_lightning.trainer.optimizers import check_moments, state_names

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*of the (completions|groups):UserWarning",
        "ignore:The number of training batches:UserWarning",
        "ignore:the learning rate is 0 from step:UserWarning",
    ),
]


def adam(lr: float, decay: float = 0.0, **more: Any) -> Callable[[Any], Any]:
    return lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=decay, **more)


def warm_up_then_fall(optimizer: Any) -> Any:
    parts = [LinearLR(optimizer, 0.1, total_iters=3), StepLR(optimizer, 2, 0.5)]
    return SequentialLR(optimizer, parts, milestones=[3])


SCHEDULES: dict[str, Callable[[Any], Any] | None] = {
    "none": None,
    "line": lambda o: LinearLR(o, 0.25, total_iters=6),
    "longer line": lambda o: LinearLR(o, 0.25, total_iters=12),
    "cycle": lambda o: OneCycleLR(o, 0.01, total_steps=8, cycle_momentum=False),
    "longer cycle": lambda o: OneCycleLR(o, 0.03, total_steps=20, cycle_momentum=False),
    "sequence": warm_up_then_fall,
    "function": lambda o: LambdaLR(o, lambda step: 1.0 / (1 + step)),
}


def rates(
    folder: Path,
    models: tuple[str, str],
    optimizer: Callable[[Any], Any],
    schedule: str,
    ckpt_path: str | None = None,
    save: str = "never",
) -> Any:
    setting = Setting(*models, lambda: KDRL(0.5), {"val_prompts": None}, {}, lambda: [Rates()])
    setting.optimizer, setting.lr_scheduler = optimizer, SCHEDULES[schedule]
    done = run(folder, setting, ckpt_path, save)
    seen = next(c for c in done.callbacks if isinstance(c, Rates))
    return done, seen


@pytest.mark.parametrize("before", ["line", "cycle", "sequence", "function"])
def test_the_learning_rate_is_that_of_the_configuration(
    tmp_path: Path, student_folder: str, teacher_folder: str, before: str
) -> None:
    models = student_folder, teacher_folder
    whole, seen = rates(tmp_path / "whole", models, adam(1e-3), before, save="steps")
    assert len(set(seen.rates)) > 4
    for step in (1, 4, 7):
        path = whole.checkpoints[step]
        rest, same = rates(tmp_path / f"same{step}", models, adam(1e-3), before, path, "rollouts")
        assert same.rates == seen.rates[step:]  # to the last bit
        same_weights(whole.weights(), rest.weights())
    other = {"line": "longer line", "cycle": "longer cycle", "sequence": "none"}.get(before, "line")
    _, fresh = rates(tmp_path / "fresh", models, adam(2e-3, 0.1), other)
    path = whole.checkpoints[4]
    _, changed = rates(tmp_path / "changed", models, adam(2e-3, 0.1), other, path, "rollouts")
    assert changed.rates == fresh.rates[4:] != seen.rates[4:]
    assert changed.decay == [0.1] * 4


def test_moments_come_from_the_checkpoint(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    models = student_folder, teacher_folder
    whole, _ = rates(tmp_path / "whole", models, adam(1e-3), "none", save="steps")
    states: list[Any] = []

    class State(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            states.append(copy.deepcopy(trainer.optimizers[0].state_dict()))

    setting = Setting(*models, lambda: KDRL(0.5), {"val_prompts": None}, {}, lambda: [State()])
    setting.optimizer = adam(1e-3, betas=(0.5, 0.9))
    run(tmp_path / "rest", setting, whole.checkpoints[4])
    assert states[0]["param_groups"][0]["betas"] == (0.5, 0.9)
    saved = torch.load(whole.checkpoints[4])["optimizer_states"][0]["state"]
    assert len(saved) > 5
    for index, moments in saved.items():
        for name, value in moments.items():
            assert torch.equal(states[0]["state"][index][name], value)


@pytest.fixture
def half(tmp_path: Path, student_folder: str, teacher_folder: str) -> str:
    """A checkpoint of RLAD in the middle of a rollout."""
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.fit(make_module(student_folder, teacher_folder), datamodule=make_data())
    path = str(tmp_path / "half.ckpt")
    trainer.save_checkpoint(path)
    return path


def go_on(tmp_path: Path, path: str, module: Any, data: Any, **trainer: Any) -> None:
    make_trainer(tmp_path, **trainer).fit(module, datamodule=data, ckpt_path=path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 5}, "`seed` must be 0 .*in the middle of a rollout.*: got 5"),
        ({"prompts_per_rollout": 8}, "`prompts_per_rollout` must be 4 .*: got 8"),
        ({"group_size": 2}, "`group_size` must be 4 .*: got 2"),
        ({"minibatches_per_rollout": 4}, "`minibatches_per_rollout` must be 2 .*: got 4"),
        ({"epochs_per_rollout": 2}, "`epochs_per_rollout` must be 1 .*: got 2"),
    ],
)
def test_another_layout_in_the_middle_of_a_rollout_is_refused(
    tmp_path: Path,
    student_folder: str,
    teacher_folder: str,
    half: str,
    change: dict[str, Any],
    words: str,
) -> None:
    module = make_module(student_folder, teacher_folder)
    with pytest.raises(ConfigurationError, match=words) as error:
        go_on(tmp_path, half, module, make_data(**change))
    assert "\n" not in str(error.value)


def test_a_rollout_in_the_checkpoint_is_no_matter_for_an_evaluation(
    tmp_path: Path, student_folder: str, teacher_folder: str, half: str
) -> None:
    module = make_module(student_folder, teacher_folder, GRPO())  # of another method, too
    data = make_data(seed=5, prompts_per_rollout=8)
    (values,) = make_trainer(tmp_path).validate(module, datamodule=data, ckpt_path=half)
    saved = torch.load(half)["state_dict"]
    assert all(torch.equal(saved[n], v) for n, v in module.state_dict().items())
    assert "val/accuracy" in values


def test_the_teachers_time_goes_on_and_a_rollout_has_its_own(
    tmp_path: Path, student_folder: str, teacher_folder: str, half: str
) -> None:
    checkpoint = torch.load(half)
    checkpoint[KEY]["teacher_seconds"] = 1000.0  # to score
    (data_state,) = [v for v in checkpoint.values() if isinstance(v, dict) and "watch" in v]
    data_state["teacher_seconds"] = 500.0  # to generate
    torch.save(checkpoint, half)
    log, data = Log(), make_data()
    go_on(tmp_path, half, make_module(student_folder, teacher_folder), data, callbacks=[log])
    assert data.teacher_seconds > 1500.0
    shown = [row["time/teacher_s"] for row in log.rows if "time/teacher_s" in row]
    assert shown and 0.0 < max(shown) < 100.0


def test_an_estimator_that_reads_scores_gets_them_in_the_middle_of_a_rollout(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    models, data = (student_folder, teacher_folder), {"minibatches_per_rollout": 4}
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(
        make_module(*models, KDRL(0.5, kl_estimator="full_vocabulary")),
        datamodule=make_data(**data),
    )
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    saved = torch.load(tmp_path / "first.ckpt")
    (state,) = [v for v in saved.values() if isinstance(v, dict) and "watch" in v]
    assert "teacher_logprobs" not in state["stored"]["tensors"]  # each update runs the teacher
    del state["teacher_seconds"]  # as in a checkpoint of before
    torch.save(saved, tmp_path / "first.ckpt")
    module, log = make_module(*models, KDRL(0.5)), Log()
    go_on(
        tmp_path,
        str(tmp_path / "first.ckpt"),
        module,
        make_data(**data),
        callbacks=[log],
        max_steps=4,
    )
    assert module.skipped_steps == 0
    assert all(row["loss/teacher_kl"] > 0.0 for row in log.rows)


def test_at_a_rollouts_end_the_layout_may_change(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    models = student_folder, teacher_folder
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.fit(make_module(*models), datamodule=make_data())
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    data = make_data(group_size=2, minibatches_per_rollout=1)
    go_on(tmp_path, str(tmp_path / "whole.ckpt"), make_module(*models), data, max_steps=6)
    assert data.watch.rollouts == 4  # two of before


def test_another_method_is_refused(
    tmp_path: Path, student_folder: str, teacher_folder: str, half: str
) -> None:
    words = r"of a run with the objective GRPO: got .*half\.ckpt, made by RLAD\. .*export"
    with pytest.raises(ConfigurationError, match=words):
        module = make_module(student_folder, None, GRPO())
        go_on(tmp_path, half, module, make_data())
    go_on(tmp_path, half, make_module(student_folder, teacher_folder, RLAD(0.1)), make_data())


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_another_student_is_refused(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    teacher_folder: str,
    student_folder: str,
    half: str,
    stage: str,
) -> None:
    other = tmp_path_factory.mktemp("other")
    save_untrained(Recipe(width=96, layers=1, steps=1, lr=1e-3, muon=False), other, seed=0)
    trainer, module = make_trainer(tmp_path), make_module(str(other), teacher_folder)
    words = rf"must hold this student: got .*, whose hidden_size is 64 .*96.*{student_folder}"
    with pytest.raises(ConfigurationError, match=words) as error:
        getattr(trainer, stage)(module, datamodule=make_data(), ckpt_path=half)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), adam(1e-3)),
        (adam(1e-3), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    ],
)
def test_another_optimizer_is_refused(
    tmp_path: Path, student_folder: str, teacher_folder: str, first: Any, second: Any
) -> None:
    """Its moments mean something else."""
    modules = [make_module(student_folder, teacher_folder) for _ in range(2)]
    modules[0].optimizer_callable, modules[1].optimizer_callable = first, second
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(modules[0], datamodule=make_data())
    trainer.save_checkpoint(tmp_path / "2.ckpt")
    names = [type(m.optimizer_callable([torch.zeros(1)])).__name__ for m in modules]
    words = rf"`optimizer` must be {names[0]} .*: got {names[1]}\."
    with pytest.raises(ConfigurationError, match=words):
        go_on(tmp_path, str(tmp_path / "2.ckpt"), modules[1], make_data())


class TwoSteps(LRScheduler):
    """Keeps the rate for two steps."""

    def get_lr(self) -> list[float]:
        if self.last_epoch > 2:
            raise ValueError("a total of 2 steps")
        return [group["lr"] for group in self.optimizer.param_groups]


def test_a_schedule_that_ends_before_the_checkpoint_is_refused(
    tmp_path: Path, student_folder: str, teacher_folder: str, half: str
) -> None:
    module = make_module(student_folder, teacher_folder)
    module.lr_scheduler_callable = lambda o: OneCycleLR(o, 0.01, total_steps=2)
    with pytest.raises(ConfigurationError, match=r"`lr_scheduler` must last .*total_steps 2\."):
        go_on(tmp_path, half, module, make_data())
    # A class of a user does not say in advance when it ends.
    module = make_module(student_folder, teacher_folder)
    module.lr_scheduler_callable = TwoSteps
    with pytest.raises(
        ConfigurationError, match=r"`lr_scheduler` must not end before step 3.*total"
    ):
        go_on(tmp_path, half, module, make_data())


def sgd(p: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(p, lr=0.1)


@pytest.mark.parametrize(
    ("there", "here", "words"),
    [
        (adam(1e-3), adam(1e-3, amsgrad=True), r"moments: got settings that need max_exp_avg_sq"),
        (
            adam(1e-3),
            lambda p: adam(1e-3)([{"params": [q]} for q in p]),
            r"of \[2\] .*\[1, 1\]",
        ),
        (adam(1e-3, amsgrad=True), adam(1e-3), None),
        (sgd, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), None),
        (torch.optim.Adafactor, torch.optim.Adafactor, None),  # of vectors: no rows and columns
    ],
)
def test_an_optimizer_that_lacks_moments_is_refused(there: Any, here: Any, words: Any) -> None:
    def stepped(make: Any) -> Any:
        weights = [torch.nn.Parameter(torch.ones(2, *more)) for more in ((), (2,))]
        optimizer = make(weights)
        optimizer.register_load_state_dict_pre_hook(partial(check_moments, state_names(make)))
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        return optimizer

    first, second = stepped(there), stepped(here)
    first.step()
    if words is None:
        second.load_state_dict(first.state_dict())
        return second.step()
    with pytest.raises(ConfigurationError, match=rf"^`optimizer` must have the check.*{words}"):
        second.load_state_dict(first.state_dict())


def test_another_tokenizer_is_refused(tmp_path: Path, student_folder: str) -> None:
    """Its ids would mean other texts; no teacher tells."""
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(make_module(student_folder, None, GRPO()), datamodule=make_data())
    trainer.save_checkpoint(tmp_path / "2.ckpt")
    other = tmp_path / "other"
    shutil.copytree(student_folder, other)
    text = (other / "tokenizer.json").read_text()
    spec = json.loads(text)
    names = spec["model"]["vocab"]
    names["1"], names["2"] = names["2"], names["1"]
    (other / "tokenizer.json").write_text(json.dumps(spec))
    words = rf"`student` must have the tokenizer of the checkpoint: got .*other, .*{student_folder}"
    with pytest.raises(ConfigurationError, match=words):
        module = make_module(str(other), None, GRPO())
        go_on(tmp_path, str(tmp_path / "2.ckpt"), module, make_data())
