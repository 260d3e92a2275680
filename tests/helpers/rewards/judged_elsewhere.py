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
    """An exception that is pickled, but cannot be unpickled."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


def answer(what: Any) -> Any:
    """Do what the text asks for: one of many things that a judge can do wrong."""
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


class Judge:
    """Judges by its state: as a callable object, by a method, or by a class method."""

    def __init__(self, worth: float) -> None:
        self.worth = worth

    def __call__(self, sample: Sample) -> float:
        """Give what it is worth."""
        return self.worth

    def method(self, sample: Sample) -> float:
        """Give what it is worth, negated."""
        return -self.worth

    @classmethod
    def of_class(cls, sample: Sample) -> float:
        """Give 0.25."""
        return 0.25

    @staticmethod
    def static(sample: Sample) -> float:
        """Give 0.125."""
        return 0.125


def scaled(factor: float, sample: Sample, *, shift: float = 0.0) -> float:
    """Give the length, scaled."""
    return factor * len(sample.text) + shift


def keyword_only(*, sample: Sample) -> float:
    """Cannot be called by position."""
    return 1.0


def two(prompt: str, completion: str) -> float:
    """Take the arguments that other libraries pass."""
    return 1.0


async def later(sample: Sample) -> float:
    """Return a coroutine."""
    return 1.0


def one_by_one(sample: Sample) -> Any:
    """Return a generator."""
    yield 1.0


def number_of(sample: Sample) -> Any:
    """Return a number in a type of several libraries."""
    import numpy as np
    import torch

    kinds = {"numpy": np.float32(0.5), "torch": torch.tensor(0.5), "bool": np.bool_(True)}
    return kinds.get(sample.text)


def with_children(what: str) -> Any:
    """Start processes in every way, say which, and hang, end or return."""
    import subprocess
    import sys

    sleep = [sys.executable, "-c", "import time; time.sleep(1000)"]
    path, _, kind = what.partition("|")
    own = subprocess.Popen(sleep)
    session = subprocess.Popen(sleep, start_new_session=True)
    nested = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import subprocess as s; s.Popen({sleep!r}, start_new_session=True)",
        ]
    )
    nested.wait()
    with open(path, "w") as file:
        file.write(f"{own.pid} {session.pid}")
    if kind == "hang":
        time.sleep(1000)
    if kind == "exit":
        os._exit(0)
    return own.pid


def with_orphan(what: str) -> int:
    """Leave a process behind that has another parent and ends soon; return its number."""
    import subprocess
    import sys

    code = "import subprocess as s; print(s.Popen(['sleep', '0.1']).pid)"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True).stdout)


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


def odd(sample: Sample) -> float:
    """Judge by what came through the pipe."""
    return float(len(sample.text) == len(sample.text.encode("utf-16-le", "surrogatepass")) // 2)
