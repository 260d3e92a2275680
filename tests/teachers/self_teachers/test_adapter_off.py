"""The student with its adapters off, against its base model loaded a second time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from helpers.short_runs import Log, fit, make_data, make_module
from kdrl_lightning import (
    GKD,
    GRPO,
    KDRL,
    AdapterOffTeacher,
    CachedTeacher,
    LocalTeacher,
    LoRA,
    RoutedTeacher,
)
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.objectives import Objective
from kdrl_lightning.rollout_batch import collate

pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")
SMALL: dict[str, Any] = {"val_prompts": None, "prompts_per_rollout": 2, "temperature": 0.8}


class Beside(pl.Callback):
    """Compares with the base model in every step, while the adapters change."""

    def __init__(self, base: str) -> None:
        self.base = LocalTeacher(base, "float32")
        self.base.load(torch.device("cpu"))
        self.moved: list[float] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        ids = torch.tensor([0, 5]).expand(*batch.completion_ids.shape, 2)
        expected = self.base.score(batch, ids)
        ours = module.teacher.score(batch, ids)
        for name, value in expected._asdict().items():
            if value is not None:
                assert (getattr(ours, name) - value).abs().max() <= 1e-6, name
        assert (ours.logprobs - batch.teacher_logprobs).abs().max() <= 1e-6
        assert (ours.logprobs - batch.ref_logprobs).abs().max() <= 1e-6
        hidden = module.teacher.states(batch).hidden
        assert (hidden - self.base.states(batch).hidden).abs().max() <= 1e-5
        assert not hidden.requires_grad
        own = module.student.score(batch).logprobs
        self.moved.append(float((own - ours.logprobs).detach().abs().max()))


def test_it_scores_as_the_base_does_after_every_step(tmp_path: Path, student_folder: str) -> None:
    beside = Beside(student_folder)
    module = make_module(
        student_folder, AdapterOffTeacher(), KDRL(0.1, ref_kl_coef=0.1), lora=LoRA(4)
    )
    fit(tmp_path, module, make_data(**SMALL), [beside], max_steps=6)
    assert isinstance(module.frozen.reference, AdapterOffTeacher)  # no second model
    assert beside.moved[0] == 0.0 and min(beside.moved[1:]) > 1e-3
    assert all(p.requires_grad for n, p in module.named_parameters() if ".lora_" in n)


@pytest.mark.parametrize(
    "objective",
    [GKD(0.5), KDRL(0.5, kl_estimator="full_vocabulary"), KDRL(0.5, kl_estimator="top_k")],
    ids=["jsd", "full vocabulary", "top-k"],
)
def test_a_run_is_that_with_the_base_as_teacher(
    tmp_path: Path, student_folder: str, objective: Objective
) -> None:
    rows = []
    for teacher in (AdapterOffTeacher(), LocalTeacher(student_folder, "float64")):
        log = Log()
        module = make_module(student_folder, teacher, objective, lora=LoRA(4))
        fit(tmp_path, module, make_data(**SMALL), [log], max_steps=4, precision="64-true")
        rows.append([{k: v for k, v in r.items() if k.startswith(("loss/", "pol"))}
                     for r in log.rows])  # fmt: skip
    assert rows[0][-1]["loss/teacher_kl"] > 0
    for ours, theirs in zip(*rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-12)


def test_the_adapters_are_on_again_behind_an_error(
    tmp_path: Path, student_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module(student_folder, AdapterOffTeacher(), KDRL(0.1), lora=LoRA(4))
    fit(tmp_path, module, make_data(**SMALL), max_steps=2)
    batch = collate([[5, 6]], [[9, 4, 1]], [0], pad_id=0)
    before = module.student.score(batch).logprobs
    with monkeypatch.context() as patch:
        patch.setattr(module.student, "states", lambda batch: 1 / 0)
        patch.setattr(module.student, "score", lambda batch, **_: 1 / 0)
        for method in (module.teacher.score, module.teacher.states):
            with pytest.raises(ZeroDivisionError):
                method(batch)
    assert torch.equal(module.student.score(batch).logprobs, before)
    assert not torch.equal(module.teacher.score(batch).logprobs, before)


@pytest.mark.parametrize("wrap", ["", "cached", "routed"])
def test_without_adapters_there_is_no_base_to_see(
    tmp_path: Path, student_folder: str, wrap: str
) -> None:
    teacher: Any = AdapterOffTeacher()
    if wrap == "cached":
        teacher = CachedTeacher(teacher, str(tmp_path / "scores.db"))
    elif wrap == "routed":
        teacher = RoutedTeacher({"a": LocalTeacher(student_folder), "b": teacher})
    words = r"`teacher` must have a LoRA student to be its base: got \w+ without `lora`"
    with pytest.raises(ConfigurationError, match=words):
        make_module(student_folder, teacher, KDRL(0.1))


def test_its_scores_can_be_kept(tmp_path: Path, student_folder: str) -> None:
    seen = []
    for _ in range(2):
        teacher = CachedTeacher(AdapterOffTeacher(), str(tmp_path / "scores.db"))
        module = make_module(student_folder, teacher, KDRL(0.1), lora=LoRA(4))
        trace = fit(tmp_path, module, make_data(**SMALL), max_steps=2)
        seen.append((teacher.hits, [b.teacher_logprobs for _, b in trace.seen]))
    assert seen[0][0] == 0 and seen[1][0] > 0
    assert all(torch.equal(a, b) for a, b in zip(seen[0][1], seen[1][1], strict=True))


def test_it_does_not_generate(tmp_path: Path, student_folder: str) -> None:
    module = make_module(student_folder, AdapterOffTeacher(), GKD(), lora=LoRA(4))
    with pytest.raises(ConfigurationError, match=r"`teacher` must be one that can generate"):
        fit(tmp_path, module, make_data(**SMALL, teacher_completions=1), max_steps=2)


def test_it_needs_the_student() -> None:
    with pytest.raises(RuntimeError, match="the teacher has no student: call look_at"):
        AdapterOffTeacher().score(collate([[5, 6]], [[9, 1]], [0], pad_id=0))


def test_a_reference_without_a_teacher(tmp_path: Path, student_folder: str) -> None:
    log = Log()
    module = make_module(student_folder, None, GRPO(ref_kl_coef=0.1), lora=LoRA(4))
    fit(tmp_path, module, make_data(**SMALL), [log], max_steps=4)
    assert log.rows[0]["loss/ref_kl"] == 0.0 and log.rows[-1]["loss/ref_kl"] > 1e-9
