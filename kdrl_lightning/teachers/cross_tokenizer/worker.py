"""Aligns a rollout in a thread, while the student scores it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from kdrl_lightning.teachers.cross_tokenizer.aligner import Aligner, Chunked


class Job(NamedTuple):
    """What the alignment of a completion depends on.

    Attributes:
        ids: the completion's token ids (int64), as bytes.
        end: the teacher's end token.
        most: most tokens that fit into the teacher's context.
    """

    ids: bytes
    end: int
    most: int


class AlignmentWorker:
    """Keeps the alignments of the current rollout; equal completions are aligned once.

    Args:
        aligner: aligns completions; it leaves the interpreter to others while it encodes.
    """

    def __init__(self, aligner: Aligner) -> None:
        self.aligner = aligner
        self._known: dict[Job, Chunked] = {}
        self._work: Future[None] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def start(self, jobs: Sequence[Job]) -> None:
        """Forget the last rollout, and begin with the next one."""
        self._wait()
        self._known = {}
        self._thread = self._thread or ThreadPoolExecutor(1, "align")
        self._work = self._thread.submit(self._align, jobs)

    def rows(self, jobs: Sequence[Job]) -> list[Chunked]:
        """Return the alignments of completions; those that were not begun are made now."""
        self._wait()
        self._align(jobs)
        return [self._known[job] for job in jobs]

    def _align(self, jobs: Sequence[Job]) -> None:
        new = [job for job in dict.fromkeys(jobs) if job not in self._known]
        found = self.aligner(
            [np.frombuffer(job.ids, np.int64) for job in new],
            [job.end for job in new],
            [job.most for job in new],
        )
        self._known.update(zip(new, found, strict=True))

    def _wait(self) -> None:
        """Wait for the thread, and raise what stopped it."""
        if self._work is not None:
            work, self._work = self._work, None
            work.result()
