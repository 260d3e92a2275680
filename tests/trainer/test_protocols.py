"""What the code around a training run asks of the module and of the data module."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from helpers.short_runs import make_data, make_module
from kdrl_lightning.trainer.protocols import RolloutData, TrainedModule, rollout_data


def members(protocol: type) -> set[str]:
    found = set(vars(protocol).get("__annotations__", ())) | set(vars(protocol))
    return {name for name in found if not name.startswith("_")}


def test_the_module_and_the_data_have_what_is_asked_of_them(student_folder: str) -> None:
    for protocol, held in (
        (TrainedModule, make_module(student_folder, None)),
        (RolloutData, make_data()),
    ):
        known = set(dir(type(held))) | set(vars(held))
        assert members(protocol) and members(protocol) <= known


def test_data_without_rollouts_is_none() -> None:
    trainer: Any = SimpleNamespace(datamodule=None)
    assert rollout_data(trainer) is None and rollout_data(SimpleNamespace()) is None  # type: ignore[arg-type]
    trainer.datamodule = SimpleNamespace(updates_per_rollout=3)
    data = rollout_data(trainer)
    assert data is not None and data.updates_per_rollout == 3
