"""The seconds that a teacher takes, on a CPU and on a GPU, where no host waits for them."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from kdrl_lightning.common.clock import ScoringClock


class Event:
    """A CUDA event of a GPU on which every mark is a quarter of a second after the last one."""

    marks, waits = 0, 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: str) -> None:
        assert stream == "stream of cuda:1"
        Event.marks += 1
        self.at = Event.marks

    def synchronize(self) -> None:
        Event.waits += 1

    def elapsed_time(self, end: Event) -> float:
        return 250.0 * (end.at - self.at)


def test_a_cpus_passes_are_timed() -> None:
    clock = ScoringClock()
    for device in ("cpu", "cuda"):  # a simulated GPU
        with clock.running(torch.device(device)):
            time.sleep(0.01)
    assert 0.02 <= clock.seconds < 1.0


def test_a_gpus_passes_are_read_when_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes: dict[str, Any] = {
        "is_available": lambda: True,
        "Event": Event,
        "current_stream": lambda device: f"stream of {device}",
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    clock = ScoringClock()
    clock.seconds = 2.0  # from a checkpoint
    for _ in range(3):
        with clock.running(torch.device("cuda:1")):
            pass
    assert not Event.waits
    assert clock.seconds == clock.seconds == 2.75
    assert Event.waits == 3
