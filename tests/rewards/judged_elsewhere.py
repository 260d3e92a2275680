"""Functions that other processes import and call."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdrl_lightning.rewards import Sample, Verdict


class TwoArguments(Exception):  # noqa: N818
    """Cannot be pickled and read again."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


def answer(what: Any) -> Any:
    """Do what is asked for; many of the things that a judge can do wrong."""
    if what == "spin":
        while True:
            pass
    if what == "sleep":
        time.sleep(1000)
    if what == "raise":
        raise KeyError("why")
    if what == "odd":
        raise TwoArguments("one", "two")
    if what == "exit":
        os._exit(0)
    if what == "memory":
        return len(bytearray(8 << 30))
    if what == "deep":
        return answer_deeply()
    if what == "unreadable":
        return lambda: None
    if isinstance(what, tuple) and what[0] == "die once":
        _, flag, whole = what
        if not Path(flag).exists():
            Path(flag).touch()
            if whole:
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
    if what == "who":
        return os.getpid()
    return what


def answer_deeply() -> Any:
    """Call itself for ever."""
    return answer_deeply()


def reward(sample: Sample) -> float | Verdict:
    """Hang, fail, or give the length."""
    if sample.text in ("spin", "raise", "exit"):
        answer(sample.text)
    if sample.text == "nan":
        return float("nan")
    return Verdict(float(len(sample.text)), False, {"length": len(sample.text)})


def batch(samples: Sequence[Sample]) -> list[float]:
    """Judge many, or too few."""
    texts = [sample.text for sample in samples]
    answer(texts[0])
    return [1.0] * (len(texts) - ("short" in texts))
