"""Stops a run on SIGTERM, SIGHUP or Ctrl-C, on all ranks at the end of the same optimizer step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

import torch
from torch import Tensor

from kdrl_lightning.errors import Interrupted

NAMES = {
    int(signal.SIGTERM): "SIGTERM",
    int(signal.SIGINT): "Ctrl-C",
    int(signal.SIGHUP): "SIGHUP",  # the terminal was closed
}
NOTICE = b"\nCtrl-C: saving after this optimizer step; press it again to stop at once\n"

Handler = Callable[[int, FrameType | None], object] | int | None


class StopSignals:
    """Records SIGTERM, SIGHUP and Ctrl-C, which ``agreed`` reports; a second Ctrl-C stops at once.

    It replaces Lightning's handlers, one of which runs a collective inside the signal handler.

    Args:
        last_words: returns a sentence about the last checkpoint, for a run that can no longer save.
    """

    def __init__(self, last_words: Callable[[], str]) -> None:
        self._handlers: dict[int, Handler] = {}
        self._number = 0
        self._prints = False
        self._last_words = last_words

    def listen(self, prints: bool) -> None:
        """Start to handle the signals, if this is the main thread.

        Args:
            prints: whether this rank prints messages.
        """
        self._number, self._prints = 0, prints
        if threading.current_thread() is threading.main_thread():
            for number in NAMES:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # `nohup`
                self._handlers[number] = signal.signal(number, self._on_signal)

    def agreed(self, reduce: Callable[[Tensor, str], Tensor]) -> int:
        """Return the number of a signal that reached any rank, or 0; all ranks must call it."""
        return int(reduce(torch.tensor(float(self._number)), "max"))

    def explain(self, error: BaseException) -> None:
        """Attach a recorded signal to an error that it may have caused, e.g. by ending an engine.

        ``python -m kdrl_lightning`` then reports the signal instead of the error. A Ctrl-C before
        the first step, or after the last one (in the export), raises Python's KeyboardInterrupt,
        which gets a message here.
        """
        if isinstance(error, KeyboardInterrupt) and not str(error):
            error.args = (f"stopped by Ctrl-C: {self._last_words()}",)
        if self._number and not isinstance(error, Interrupted | KeyboardInterrupt):
            words = f"stopped by {NAMES[self._number]} within a step: {self._last_words()}"
            error.interrupted = Interrupted(words, self._number)  # type: ignore[attr-defined]

    def give_back(self) -> None:
        """Restore the earlier handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == self._number == signal.SIGINT:
            raise KeyboardInterrupt(f"stopped at once by Ctrl-C: {self._last_words()}")
        if number == signal.SIGINT and self._prints:
            os.write(2, NOTICE)  # the signal may have interrupted a print
        if number == signal.SIGHUP:
            _leave_terminal()
        self._number = number


def _leave_terminal() -> None:
    """Discard output that went to a terminal, because writing to a closed one is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if os.isatty(descriptor):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)
