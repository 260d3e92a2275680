"""Measures how long a teacher scores, without making the host wait for a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ScoringClock:
    """Adds up the seconds of passes.

    On a GPU events mark the start and the end of each pass; we read them only when somebody asks
    for ``seconds``. On a CPU, or on a simulated GPU, it is the host's time.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Add the time of the work inside the context on a device."""
        if device.type != "cuda" or not torch.cuda.is_available():
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        stream = torch.cuda.current_stream(device)
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record(stream)
        yield
        ended.record(stream)
        self._marks.append((began, ended))

    @property
    def seconds(self) -> float:
        """Seconds of all passes so far; the host waits until the GPU has finished them."""
        marks, self._marks = self._marks, []
        for began, ended in marks:
            ended.synchronize()
            self._seconds += began.elapsed_time(ended) / 1000.0
        return self._seconds

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._seconds, self._marks = value, []
