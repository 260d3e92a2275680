"""The examples of docs/own_objective.md are run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.reference import close, f64
from kdrl_lightning.cli.main import KDRLCLI
from kdrl_lightning.losses import TokenScores
from kdrl_lightning.objectives import SequenceRatio, SumAdvantage, WrongCompletions
from kdrl_lightning.rollout_batch import collate

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "own_objective.md").read_text()


def block(language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)
    assert len(found) == 1
    return str(found[0])


def test_the_python_example_is_short_and_computes_what_it_says() -> None:
    code = block("python")
    body = code[code.index("class WhereSurer") :].strip().splitlines()
    assert len(body) <= 20
    names: dict[str, Any] = {}
    exec(code, names)
    objective = names["objective"]
    assert objective.needs_teacher and objective.needs_groups
    batch = collate([[1], [1]], [[2, 3], [2, 3]], [0, 0], pad_id=0, rewards=[1.0, 0.0])
    old, teacher = f64([[-1.0, -2.0]] * 2), f64([[-0.5, -3.0]] * 2)
    batch = batch.replace(
        old_logprobs=old,
        old_entropy=f64([[1.0, 1.0]] * 2),
        teacher_logprobs=teacher,
        teacher_entropy=f64([[0.5, 2.0]] * 2),
    )
    batch = objective.prepare(batch).replace(totals=batch.count(2))
    logprobs = old.clone().requires_grad_()
    loss, _ = objective(batch, TokenScores(logprobs, torch.zeros_like(logprobs)))
    loss.backward()
    assert logprobs.grad is not None and batch.advantages is not None
    # At ratio 1 the gradient is -advantage / tokens; the first token has d = 0.5.
    a = float(batch.advantages[0])
    expected = f64([[a + 0.3 * 0.5, a], [-a + 0.3 * 0.5, -a]])
    close(logprobs.grad, -expected / 4)


def test_the_yaml_example_is_accepted(tmp_path: Path) -> None:
    config = yaml.safe_load(block("yaml"))
    config["base"] = str(ROOT / "configs/base/embedded_teacher.yaml")
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(config))
    objective = KDRLCLI.run(["--config", str(file)], instantiate_only=True).model.objective
    assert isinstance(objective.ratio, SequenceRatio)
    assert isinstance(objective.advantage, SumAdvantage)
    assert [type(s) for s in objective.selection] == [WrongCompletions]
    assert objective.reduction == "sequence_mean"


@pytest.mark.parametrize("part", re.findall(r"`([A-Z]\w+)`", PAGE.split("## By")[0]))
def test_every_part_that_is_named_exists(part: str) -> None:
    import kdrl_lightning.objectives as objectives

    assert hasattr(objectives, part)
