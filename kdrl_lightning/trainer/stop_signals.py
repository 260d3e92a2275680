"""Signals that stop a run at the end of an optimizer step, on all ranks alike."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from kdrl_lightning.errors import Interrupted

NAMES = {int(signal.SIGTERM): "SIGTERM", int(signal.SIGINT): "Ctrl-C"}
NOTICE = b"\nCtrl-C: saving after this optimizer step; once more stops at once\n"


class StopSignals:
    """Notes SIGTERM and Ctrl-C until the ranks ask for them; a second Ctrl-C stops at once.

    In place of Lightning's handlers, one of which runs a collective inside the signal's.

    Args:
        last_words: what a run that cannot save any more says of its last checkpoint.
    """

    def __init__(self, last_words: Callable[[], str]) -> None:
        self._handlers: dict[int, Any] = {}
        self._number = 0
        self._speaks = False
        self._last_words = last_words

    def listen(self, speaks: bool) -> None:
        """Take the signals, if this is the main thread.

        Args:
            speaks: on the rank that answers the user.
        """
        self._number, self._speaks = 0, speaks
        if threading.current_thread() is threading.main_thread():
            for number in NAMES:
                self._handlers[number] = signal.signal(number, self._on_signal)

    def agreed(self, reduce: Callable[[Tensor, str], Tensor]) -> int:
        """Return the number of a signal that reached one of the ranks, or 0; all must ask."""
        return int(reduce(torch.tensor(float(self._number)), "max"))

    def explain(self, error: BaseException) -> None:
        """Let an error that followed a signal say so: it may have ended an engine's process first.

        ``python -m kdrl_lightning`` then reports the signal instead of the error. A Ctrl-C before
        the first step, or after the last one (in the export), is Python's own, without words.
        """
        if isinstance(error, KeyboardInterrupt) and not str(error):
            error.args = (f"stopped by Ctrl-C: {self._last_words()}",)
        if self._number and not isinstance(error, Interrupted | KeyboardInterrupt):
            words = f"stopped by {NAMES[self._number]} within a step: {self._last_words()}"
            error.interrupted = Interrupted(words, self._number)  # type: ignore[attr-defined]

    def give_back(self) -> None:
        """Restore the handlers from before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == self._number == signal.SIGINT:
            raise KeyboardInterrupt(f"stopped at once by Ctrl-C: {self._last_words()}")
        if number == signal.SIGINT and self._speaks:
            os.write(2, NOTICE)  # print may be what it interrupts
        self._number = number
