"""Two real processes that were given, or have found, different checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers.processes.two_ranks import TwoRanks
from kdrl_lightning.checkpoints.reader import content_mark
from kdrl_lightning.checkpoints.resume import require_same
from kdrl_lightning.errors import ConfigurationError


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_go_on_from_one_checkpoint_or_are_refused(two_ranks: TwoRanks, strategy: str) -> None:
    found = json.loads((two_ranks("resumed_ranks") / "said.json").read_text())[strategy]
    assert found["made"] == ["step 2"] * 2
    assert found["same"] == found["copied"] == ["step 3"] * 2
    for case, first, second in (
        ("steps", "step=00000001.ckpt", "step=00000002.ckpt"),
        ("none", "None", "step=00000002.ckpt"),
        ("none on the second", "step=00000001.ckpt", "None"),
    ):
        zero, one = found[case]
        assert zero.startswith("`ckpt_path` must be the same on all processes: got ")
        assert zero.split(" got ")[1].split(" and ")[0].endswith(first)
        assert f"{second}. Name a checkpoint that all of them see, instead of `last`." in one


def test_another_file_under_the_same_path_is_refused(tmp_path: Path) -> None:
    path, ours = tmp_path / "step=1.ckpt", []
    for value in (1.0, 2.0):
        torch.save({"step": torch.tensor(value)}, path)
        ours.append(content_mark(str(path)))
    assert ours[0] != ours[1]
    sent = iter([str(path), ours[0]])
    words = rf"^`ckpt_path` must be the same on all processes: got {path} and another one at"
    with pytest.raises(ConfigurationError, match=words):
        require_same(str(path), ours[1], lambda value: next(sent), lambda value, how: value)
    require_same(str(path), ours[1], lambda value: value, lambda value, how: value)
    assert content_mark(str(tmp_path)) is content_mark(str(tmp_path / "none")) is None
    path.write_text("no archive")
    assert content_mark(str(path)) is None
