"""Runs one check: ``python -m kdrl_lightning.hardware.doctor.child NAME FOLDER``."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kdrl_lightning.hardware.doctor.bench import Bench
from kdrl_lightning.hardware.doctor.findings import NotReachedError

# `Any`: lines of JSON.


def main(name: str, folder: Path) -> None:
    """Run a check; write each finding to ``NAME.jsonl`` at once, and at the end how it ended."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    bench = Bench(folder, torch.device("cuda", 0) if gpus else torch.device("cpu"), gpus)
    check = importlib.import_module(f"kdrl_lightning.hardware.doctor.checks.{name}")
    with (folder / f"{name}.jsonl").open("w") as out:

        def write(line: dict[str, Any]) -> None:
            print(json.dumps(line), file=out, flush=True)

        try:
            for finding in check.run(bench):
                write(asdict(finding))
            write({"ended": "done", "reason": ""})
        except NotReachedError as error:
            write({"ended": "not reached", "reason": str(error)})
        except Exception as error:
            traceback.print_exc()
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            write({"ended": "failed", "reason": reason[:500]})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
