"""If one rank fails alone, all of them end soon, each with the reason."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from helpers.processes.ready import run_ranks
from helpers.with_vllm.need import ROOT

DRIVER = ROOT / "tests/helpers/processes/failing_rank_driver.py"
# Seconds for a case. Ranks that wait for a failed one in a collective wait for 30 minutes.
SOON = 30.0
# The first rank to fail, and what both must say.
REASONS = {
    "disk full": (0, "`weights_folder` must have room for the student's weights: got OSError"),
    "value in files": (0, "a strange tensor"),
    "transfer value": (0, "must take the weights through the transfer API: got a wrong shape."),
    "transfer import": (0, "got no weight transfer in this vLLM. Resume from"),
    "route": (1, "no backend here"),
    "in process": (0, "vLLM could not take the weights: unknown weight"),
    "setup": (1, "the server http://127.0.0.1:9 must answer within `max_away_s`"),
    "teacher": (1, "the teacher's server is away"),
    "start": (1, "which could not start: no memory for a cache"),
    "killed": (1, ""),
}
# The other rank is told by the group, which carries no words: the teacher's scores are reduced by
# the trainer, and a rank that has ended says why by itself.
WITHOUT_WORDS = {"teacher", "start", "killed"}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[float, str]]]:
    """How each case ended on each rank."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    run_ranks(str(DRIVER), [[str(folder), str(rank)] for rank in (0, 1)], env, timeout=90)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", REASONS)
def test_all_ranks_end_with_the_reason(
    ended: list[dict[str, tuple[float, str]]], case: str
) -> None:
    first, reason = REASONS[case]
    for rank, cases in enumerate(ended):
        seconds, words = cases[case]
        assert seconds < SOON
        told = case in WITHOUT_WORDS and rank != first
        said = "another process had to stop" if told else reason
        assert said in words
