"""A source with 1 % bad rows: two ranks and a resume draw and count what one process does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from helpers.processes.bad_rows_driver import Rows

ROOT = Path(__file__).parents[2]
ROWS, ROLLOUTS, PROMPTS = 5_000, 6, 64


def test_two_ranks_and_a_resume_draw_what_one_process_draws(
    tmp_path: Path, student_folder: str
) -> None:
    shutil.copytree(student_folder, tmp_path / "student")
    driver = [str(ROOT / "tests/helpers/processes/bad_rows_driver.py"), str(tmp_path)]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    for start in ([], launcher):
        out = subprocess.run(
            [sys.executable, *start, *driver, str(ROWS), str(ROLLOUTS), str(PROMPTS)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert out.returncode == 0, out.stderr[-4000:]
    one, two = (json.loads((tmp_path / f"drawn{ranks}.json").read_text()) for ranks in (1, 2))
    assert one["whole"] == one["resumed"] == two["whole"] == two["resumed"]
    drawn = [prompt for rollout, _ in one["whole"] for prompt, _ in rollout]
    assert len(drawn) == 2 * ROLLOUTS * PROMPTS
    source = Rows(ROWS)
    assert [f"{source[int(prompt[:-1])]['prompt']}" for prompt in drawn] == drawn
    assert sum(bad for _, bad in one["whole"]) >= 2
    # Only what takes the place of a bad row comes again, in the next rollout.
    again = len(drawn) - 2 * len(set(drawn))
    assert again <= 2 * sum(bad for _, bad in one["whole"])
