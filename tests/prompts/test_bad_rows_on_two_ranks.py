"""A source with 1 % bad rows: two ranks and a resume draw and count what one process does."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

from helpers.processes.bad_rows_driver import Rows, draw
from helpers.processes.two_ranks import DRIVERS, TwoRanks

ROWS, ROLLOUTS, PROMPTS = map(int, DRIVERS["bad_rows"])


def test_two_ranks_and_a_resume_draw_what_one_process_draws(
    tmp_path: Path, two_ranks: TwoRanks, student_folder: str
) -> None:
    two = json.loads((two_ranks("bad_rows") / "drawn2.json").read_text())
    shutil.copytree(student_folder, tmp_path / "student")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = json.loads(json.dumps(draw(tmp_path, ROWS, ROLLOUTS, PROMPTS)))
    assert one["whole"] == one["resumed"] == two["whole"] == two["resumed"]
    drawn = [prompt for rollout, _ in one["whole"] for prompt, _ in rollout]
    assert len(drawn) == 2 * ROLLOUTS * PROMPTS
    source = Rows(ROWS)
    assert [f"{source[int(prompt[:-1])]['prompt']}" for prompt in drawn] == drawn
    assert sum(bad for _, bad in one["whole"]) >= 2
    # Only what takes the place of a bad row comes again, in the next rollout.
    again = len(drawn) - 2 * len(set(drawn))
    assert again <= 2 * sum(bad for _, bad in one["whole"])
