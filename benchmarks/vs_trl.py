"""Ours against TRL's trainers on the same work: seconds, memory and tokens per second.

python benchmarks/vs_trl.py --out results [--cases smollm2-grpo ...] [--runs 5]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__" and sys.argv[1] == "--child":
    import torch
    from peers.job import Job

    job = Job(**json.loads(sys.argv[2]))
    torch.set_num_threads(job.threads)
    torch.manual_seed(job.seed)
    if job.side == "ours":
        from peers.ours import run
    else:
        from peers.theirs import run
    print("RESULT " + json.dumps(run(job)))
