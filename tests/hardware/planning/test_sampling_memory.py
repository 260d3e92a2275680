"""The transformers engine allocates what is planned while it samples."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.allocated import allocated
from helpers.engines import engine_for
from helpers.planned_models import SMALL
from kdrl_lightning import GRPO, KDRLModule, RolloutSettings
from kdrl_lightning.engines import Sampling, transformers_engine
from kdrl_lightning.hardware.planning.engine import decode
from kdrl_lightning.hardware.planning.job import Job
from kdrl_lightning.hardware.planning.rehearsal import rehearse
from kdrl_lightning.models.loading import load_causal_lm

GROUP, PROMPT, END = 6, 7, 1


@pytest.mark.parametrize("tokens", [33, 64])
def test_rows_that_leave_near_the_end_are_planned(
    student_folder: str, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    prompts = [[2, 3, 4, 5, 6, 7, 8][: PROMPT - short] for short in (0, 0, 1)]
    rows = GROUP * len(prompts)
    job = Job(RolloutSettings(3, GROUP, tokens), on_gpu=False, longest_prompt=PROMPT)
    with rehearse(KDRLModule(student_folder, GRPO()), job) as run:
        planned = decode(run, rows).peak
    steps, draw = itertools.count(), transformers_engine._draw

    def drawn(*given: Any) -> tuple[Tensor, Tensor]:
        """Draw as always, but completions of a group differ, and one ends near the end."""
        _, logprob = draw(*given)
        token = 2 + torch.arange(len(logprob)) % GROUP
        if next(steps) == tokens - 3:
            token[0] = END
        return token, logprob

    engine = engine_for(load_causal_lm(student_folder))
    monkeypatch.setattr(transformers_engine, "_draw", drawn)
    seeds = [list(range(GROUP)) for _ in prompts]
    found = allocated(lambda: engine.generate(prompts, seeds, Sampling(tokens)))
    assert planned == pytest.approx(found, rel=0.1)


def test_a_temperature_takes_a_table_of_logits(tmp_path: Path) -> None:
    file, rows, vocabulary = tmp_path / "config.json", 64, 1 << 14
    file.write_text(json.dumps(SMALL | {"vocab_size": vocabulary}))
    plain = Job(on_gpu=False, longest_prompt=PROMPT, model_configs={"small": str(file)})
    peaks = []
    with rehearse(KDRLModule("small", GRPO()), plain) as run:
        for temperature in (1.0, 0.7):
            rollout = RolloutSettings(max_tokens=33, temperature=temperature)
            run.job = replace(plain, rollout=rollout)
            peaks.append(decode(run, rows).peak)
    assert peaks[1] - peaks[0] == 4 * rows * vocabulary
