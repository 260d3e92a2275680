"""The thread that aligns: what it overlaps with, in which order, and what it costs."""

from __future__ import annotations

import tracemalloc
from threading import Event
from typing import Any

import numpy as np
import pytest

from helpers.small_tokenizers import by_hand
from kdrl_lightning.teachers.cross_tokenizer import Aligner, AlignmentWorker, Job, TokenBytes
from kdrl_lightning.teachers.cross_tokenizer import worker as module

END = 1
PATIENCE = 30.0  # seconds; only a broken test waits that long


def job(*ids: int) -> Job:
    return Job(np.array(ids, np.int64).tobytes(), END, 100)


class Slow:
    """An aligner that waits for a word before each block, and notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.go: list[Event] = []

    def __call__(self, completions: Any, ends: Any, most: Any) -> list[Any]:
        self.asked.append([len(ids) for ids in completions])
        assert self.go[len(self.asked) - 1].wait(PATIENCE)
        return [tuple(ids.tolist()) for ids in completions]


def test_short_completions_are_ready_while_longer_ones_are_aligned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The teacher scores the first rows before the last ones are aligned, and nobody is waited for.

    The test lets the second block begin only after the first one's rows were handed out: a worker
    that waited for the whole rollout would stop here.
    """
    monkeypatch.setattr(module, "BLOCK", 2)
    slow = Slow()
    slow.go = [Event() for _ in range(4)]
    worker = AlignmentWorker(slow)  # type: ignore[arg-type]
    long, short, middle, same = job(2, 3, 4), job(2), job(2, 3), job(2)
    worker.start([long, short, middle, same])  # returns although the thread waits
    slow.go[0].set()
    assert worker.rows([short, same, middle]) == [(2,), (2,), (2, 3)]
    assert slow.asked[0] == [1, 2]
    slow.go[1].set()
    assert worker.rows([long]) == [(2, 3, 4)]
    # What was not begun is aligned when asked for; a new rollout forgets the old one.
    slow.go[2].set()
    assert worker.rows([job(9)]) == [(9,)]
    worker.start([])
    slow.go[3].set()
    worker.rows([short])
    assert slow.asked == [[1, 2], [3], [1], [1]]


def test_what_stops_the_thread_is_raised_where_the_rows_are_read() -> None:
    class Broken:
        def __call__(self, *args: Any) -> Any:
            raise RuntimeError("no such tokenizer")

    worker = AlignmentWorker(Broken())  # type: ignore[arg-type]
    worker.start([job(2)])
    with pytest.raises(RuntimeError, match="no such tokenizer"):
        worker.rows([job(2)])


def test_no_table_of_both_lengths_is_made() -> None:
    """A completion of 30,000 tokens without a space: a table of bits would take 100 MB."""
    merging = by_hand(["a", "b", "ab"], [("a", "b")])
    pair = [TokenBytes(t, "x", [END]) for t in (by_hand("ab"), merging)]
    aligner = Aligner(*pair, [END])
    ids = np.tile([2, 3], 15_000)
    tracemalloc.start()
    (one,) = aligner([ids], [END])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert one.places.tolist() == [0, 1] * 15_000 and len(one.teacher_ids) == 15_000
    assert peak < 20e6
