"""Starts two processes once for drivers whose results tests of several folders read.

As a script, ``two_ranks.py FOLDER`` runs the drivers one after the other.
"""

from __future__ import annotations

import os
import shutil
import sys
from importlib import import_module
from pathlib import Path

from filelock import FileLock

from helpers.processes.ready import run_ranks

ROOT = Path(__file__).parents[3]
# A driver's name -> its arguments after the folder.
DRIVERS = {
    "two_ranks": ("2", "ddp", "fsdp2"),
    "bad_rows": ("5000", "6", "64"),  # rows, rollouts, prompts
    "resumed_ranks": ("ddp", "fsdp2"),
}


class TwoRanks:
    """Returns the folder with the results of a driver's two processes.

    Args:
        folder: where each driver gets a folder; workers of a parallel session share it.
        student: the model that each driver reads as ``student``.
    """

    def __init__(self, folder: Path, student: str) -> None:
        self.folder, self.student = folder, student

    def __call__(self, driver: str) -> Path:
        with FileLock(f"{self.folder}.lock"):
            if not (self.folder / "done").exists():
                self.start()
        return self.folder / driver

    def start(self) -> None:
        for driver in DRIVERS:
            shutil.rmtree(self.folder / driver, ignore_errors=True)
            shutil.copytree(self.student, self.folder / driver / "student")
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        run_ranks(__file__, [[str(self.folder)]] * 2, env)
        (self.folder / "done").touch()


def main() -> None:
    folder = Path(sys.argv[1])
    for driver, arguments in DRIVERS.items():
        module = import_module(f"helpers.processes.{driver}_driver")
        sys.argv = [driver, str(folder / driver), *arguments]
        module.main()


if __name__ == "__main__":
    main()
