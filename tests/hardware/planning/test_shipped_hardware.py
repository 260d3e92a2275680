"""The overlays of ``configs/hardware`` for one GPU fit the card that they name, by plan.

Those for a node take minutes to plan: ``benchmarks/recipes.py`` does.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.recipes import OVERLAYS, parsed
from kdrl_lightning.hardware.planning.cards import bytes_of
from kdrl_lightning.hardware.planning.planner import plan

FOLDER = Path(__file__).parents[3] / "configs" / "hardware"
ADDED = {"nodes"}  # changes nothing but the number of nodes of another overlay


def test_every_overlay_is_planned() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} - ADDED == set(OVERLAYS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpu1", "gpu1_vllm"])
def test_an_overlay_fits_the_card_that_it_names(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    base = re.search(r"^base: (\S+)", text, re.M)
    text += (FOLDER / base[1]).read_text() if base else ""
    (card,) = set(re.findall(r"GPUs? of (\d+ GB)", text))
    job, module, _ = parsed([*OVERLAYS[name], f"--config=hardware/{name}"])
    assert job.on_gpu and job.mixed
    made = plan(module, job, bytes_of(card), cure=False)
    assert made.fits, (made.worst.name, made.worst.parts)
    assert made.largest is not None and made.largest >= made.tokens
