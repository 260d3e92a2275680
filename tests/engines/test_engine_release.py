"""An engine is asked to free memory once it has sampled, and gets the weights before it samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from helpers.short_runs import fit, make_data, make_module
from kdrl_lightning.engines import TransformersEngine


class Sleeper(TransformersEngine):
    """Forgets its weights when released, as vLLM's second level of sleep does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def update_weights(self, *args: Any) -> None:
        super().update_weights(*args)
        self.calls.append("push")

    def generate(self, *args: Any) -> Any:
        assert self.version is not None and self.version >= 0, "asleep"
        self.calls.append("sample")
        return super().generate(*args)

    def release(self) -> None:
        self.version = -1
        self.calls.append("release")


# A random model stops late and is rarely right.
@pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")
def test_push_sample_release(tmp_path: Path, student_folder: str, teacher_folder: str) -> None:
    engine = Sleeper()
    data = make_data(rollout_engine=engine)
    trace = fit(tmp_path, make_module(student_folder, teacher_folder), data, max_steps=8)
    # Four rollouts, and a validation after each epoch of two.
    assert engine.calls == ["push", "sample", "release"] * 6
    assert all(int(batch.policy_version.min()) == step // 2 * 2 for step, batch in trace.seen)
