"""Offloaded teachers: how often their weights travel, and what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.short_runs import fit, make_data, make_module
from kdrl_lightning import GKD, KDRL, LocalTeacher
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.objectives import Objective
from kdrl_lightning.rollout.updates import scoring as updates
from kdrl_lightning.teachers import RoutedTeacher, offload
from kdrl_lightning.teachers.offload import OffloadedWeights

pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")
ROLLOUTS = 2
SMALL: dict[str, Any] = {
    **{"val_prompts": None, "prompts_per_rollout": 4, "group_size": 2, "max_tokens": 6},
    "minibatches_per_rollout": 2,
}


def test_weights_are_lent_and_never_copied_back(
    teacher_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []

    def cloned(master: torch.Tensor, device: torch.device) -> torch.Tensor:
        moved.append(master.nbytes)
        return master.clone()

    monkeypatch.setattr(offload, "fetched", cloned)
    model = load_causal_lm(teacher_folder)
    before = {name: p.clone() for name, p in model.named_parameters()}
    weights, whole = OffloadedWeights(model), sum(p.nbytes for p in model.parameters())
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    for times in (1, 2):
        weights.lend(torch.device("cpu"))
        weights.lend(torch.device("cpu"))  # there already
        assert sum(moved) == times * whole
        for name, parameter in model.named_parameters():
            assert parameter.data_ptr() != places[name]
            parameter.data.zero_()  # a copy that came back would show this
        weights.take_back()
        for name, parameter in model.named_parameters():
            assert parameter.data_ptr() == places[name]
            assert torch.equal(parameter, before[name])


def test_buffers_are_on_the_device_of_the_weights() -> None:
    with FakeTensorMode():
        module = torch.nn.BatchNorm1d(4)
        weights = OffloadedWeights(module)
        weights.lend(torch.device("cuda:1"))
        assert {b.device for b in module.buffers()} == {torch.device("cuda:1")}
        weights.take_back()
        assert {b.device for b in module.buffers()} == {torch.device("cpu")}


@pytest.fixture
def lends(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """When weights are lent and taken back, and when the teacher scores a part."""
    seen: list[str] = []
    for name in ("lend", "take_back"):
        original = getattr(OffloadedWeights, name)

        def counted(self: Any, *args: Any, original: Any = original, name: str = name) -> None:
            before = self._lent if hasattr(self, "_lent") else None
            original(self, *args)
            if before is not None and before != self._lent:
                seen.append(name)

        monkeypatch.setattr(OffloadedWeights, name, counted)
    for name in ("score", "states"):
        asked = getattr(LocalTeacher, name)

        def scored(
            self: Any, *args: Any, asked: Any = asked, name: str = name, **named: Any
        ) -> Any:
            out = asked(self, *args, **named)
            seen.append(name)
            return out

        monkeypatch.setattr(LocalTeacher, name, scored)
    return seen


@pytest.mark.parametrize("routed", [False, True])
def test_an_offloaded_teacher_travels_once_per_rollout(
    tmp_path: Path,
    student_folder: str,
    teacher_folder: str,
    lends: list[str],
    monkeypatch: pytest.MonkeyPatch,
    routed: bool,
) -> None:
    monkeypatch.setattr(updates, "joined", lambda parts, *_: parts)  # a pass per micro-batch
    monkeypatch.setattr(RoutedTeacher, "route", lambda self, row: 0)
    teacher: Any = LocalTeacher(teacher_folder, offload=True)
    teacher = RoutedTeacher({"only": teacher}) if routed else teacher
    module = make_module(student_folder, teacher, KDRL())
    data, steps = make_data(**SMALL), 2 * ROLLOUTS
    fit(tmp_path, module, data, max_steps=steps, accumulate_grad_batches=2)
    assert lends == ["lend", *["score"] * 4, "take_back"] * ROLLOUTS


def test_a_teacher_that_updates_run_stays_until_the_next_rollout(
    tmp_path: Path, student_folder: str, teacher_folder: str, lends: list[str]
) -> None:
    objective: Objective = GKD()
    module = make_module(student_folder, LocalTeacher(teacher_folder, offload=True), objective)
    fit(tmp_path, module, make_data(**SMALL), max_steps=2 * ROLLOUTS, accumulate_grad_batches=2)
    one = ["lend", *["states"] * 4]
    assert lends == [*one, "take_back", *one]
