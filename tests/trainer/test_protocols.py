"""The protocols through which other code uses the module and the data module."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from helpers.short_runs import make_data, make_module, make_trainer
from kdrl_lightning import GRPO
from kdrl_lightning.rollout.policy import Policy, Precision, Run
from kdrl_lightning.trainer.protocols import RolloutData, TrainedModule, rollout_data


def own_members(protocol: type) -> set[str]:
    found = set(vars(protocol).get("__annotations__", ())) | set(vars(protocol))
    return {name for name in found if not name.startswith("_")}


def members(protocol: type) -> set[str]:
    """What a protocol asks for, with what the protocols that it extends ask for."""
    return {name for kind in protocol.__mro__ for name in own_members(kind)}


def test_the_module_and_the_data_have_what_is_asked_of_them(
    student_folder: str, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path)
    module = make_module(student_folder, None, GRPO())
    for protocol, held in (
        (Policy, module),
        (TrainedModule, module),
        (RolloutData, make_data()),
        (Run, trainer),
        (Precision, trainer.precision_plugin),
    ):
        known = set(dir(type(held))) | set(vars(held))
        assert members(protocol) and members(protocol) <= known


def test_the_trained_module_is_a_policy_and_no_attribute_is_described_twice() -> None:
    assert members(Policy) < members(TrainedModule)
    assert not own_members(TrainedModule) & members(Policy)


def test_data_without_rollouts_is_none() -> None:
    trainer: Any = SimpleNamespace(datamodule=None)
    assert rollout_data(trainer) is None and rollout_data(SimpleNamespace()) is None  # type: ignore[arg-type]
    trainer.datamodule = SimpleNamespace(updates_per_rollout=3)
    data = rollout_data(trainer)
    assert data is not None and data.updates_per_rollout == 3
