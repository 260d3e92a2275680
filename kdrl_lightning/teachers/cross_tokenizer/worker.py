"""Aligns a rollout in a thread, while the student scores it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from kdrl_lightning.teachers.cross_tokenizer.aligner import Aligner, Chunked

# Completions per block: few, so that the first are ready soon, but not too few, because equal words
# are encoded again in each block.
BLOCK = 512


class Job(NamedTuple):
    """What the alignment of a completion depends on.

    Attributes:
        ids: the completion's token ids (int64), as bytes.
        end: the teacher's end token.
        most: maximum number of tokens that fit into the teacher's context after its prompt.
    """

    ids: bytes
    end: int
    most: int


class AlignmentWorker:
    """Aligns the current rollout in a thread, in blocks, and each distinct completion once.

    Meanwhile the student scores the rollout, and the teacher the completions that are aligned. The
    shortest completions come first, as in the micro-batches of an update.

    Args:
        aligner: aligns completions; it releases Python's interpreter lock while it encodes.
    """

    def __init__(self, aligner: Aligner) -> None:
        self.aligner = aligner
        self._found: dict[Job, Future[dict[Job, Chunked]]] = {}
        self._thread: ThreadPoolExecutor | None = None

    def start(self, jobs: Sequence[Job]) -> None:
        """Forget the last rollout, and begin with the next one."""
        for block in self._found.values():
            block.cancel()
        self._found = {}
        self._submit(jobs)

    def rows(self, jobs: Sequence[Job]) -> list[Chunked]:
        """Return the alignments of completions, once their blocks are done.

        Completions that ``start`` did not get are aligned now. Errors of the thread are raised
        here.
        """
        self._submit(jobs)
        return [self._found[job].result()[job] for job in jobs]

    def _submit(self, jobs: Sequence[Job]) -> None:
        new = [job for job in dict.fromkeys(jobs) if job not in self._found]
        new.sort(key=lambda job: len(job.ids))
        self._thread = self._thread or ThreadPoolExecutor(1, "align")
        for first in range(0, len(new), BLOCK):
            block = new[first : first + BLOCK]
            self._found |= dict.fromkeys(block, self._thread.submit(self._align, block))

    def _align(self, jobs: Sequence[Job]) -> dict[Job, Chunked]:
        rows = self.aligner(
            [np.frombuffer(job.ids, np.int64) for job in jobs],
            [job.end for job in jobs],
            [job.most for job in jobs],
        )
        return dict(zip(jobs, rows, strict=True))
