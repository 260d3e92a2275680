"""Restores settings of the training process that a user's reward function has changed.

These are the settings that decide a run's numbers, or how it is stopped: torch's defaults, signal
handlers, the working folder. Environment variables, warning filters, log levels and the locale stay
as the function leaves them: they do not change what is trained.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

# `Any`: values of settings, and states of random generators.


class Setting(NamedTuple):
    """A setting of the process.

    Attributes:
        name: what users call it.
        read: returns its value.
        write: sets a value that ``read`` has returned.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]


def _precision() -> Any:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by torch's newer interface, which the older one cannot read
        kinds: Any = torch.backends  # its types lack the newer interface
        return kinds.cuda.matmul.fp32_precision, kinds.mkldnn.matmul.fp32_precision


def _set_precision(value: Any) -> None:
    if isinstance(value, str):
        torch.set_float32_matmul_precision(value)
        return
    kinds: Any = torch.backends
    kinds.cuda.matmul.fp32_precision, kinds.mkldnn.matmul.fp32_precision = value


def _deterministic() -> tuple[bool, bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )


def _set_deterministic(value: tuple[bool, bool, bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = value[2:]


def _set_device(value: torch.device) -> None:
    # Setting a default device, even the CPU, slows all calls of torch.
    torch.set_default_device(None if value.type == "cpu" else value)


SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, n)]


def _handlers() -> list[Any]:
    return [signal.getsignal(number) for number in SIGNALS]


def _set_handlers(handlers: list[Any]) -> None:
    if threading.current_thread() is threading.main_thread():  # no other thread may set one
        for number, handler in zip(SIGNALS, handlers, strict=True):
            if handler is not None:  # None: Python did not set the handler
                signal.signal(number, handler)


DEFAULTS = (
    Setting("torch's default dtype", torch.get_default_dtype, torch.set_default_dtype),
    Setting("torch's default device", torch.get_default_device, _set_device),
    Setting("torch's gradient mode", torch.is_grad_enabled, torch.set_grad_enabled),
)
ALL = (
    *DEFAULTS,
    Setting("torch's deterministic algorithms", _deterministic, _set_deterministic),
    Setting("torch's number of threads", torch.get_num_threads, torch.set_num_threads),
    Setting("torch's precision of float32 products", _precision, _set_precision),
    Setting("the handlers of signals", _handlers, _set_handlers),
)


@contextmanager
def restored(tell: Callable[[str], object], settings: tuple[Setting, ...] = ALL) -> Iterator[None]:
    """Restore settings that change inside the context.

    Args:
        tell: gets a text such as "torch's default dtype from torch.float32 to torch.float64" for
            each setting that changed.
        settings: the settings to restore.
    """
    before = [setting.read() for setting in settings]
    try:
        yield
    finally:
        for setting, had in zip(settings, before, strict=True):
            found = setting.read()
            if found != had:
                setting.write(had)
                values = "" if isinstance(had, tuple | list) else f" from {had} to {found}"
                tell(f"{setting.name}{values}")


class Surroundings:
    """Protects the run from what a reward changes in the training process.

    The reward has separate random states for Python, numpy and torch on the CPU, which continue
    from call to call. Whatever it draws or seeds, the run's random states stay as they were.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._states: Any = None  # None: the first call starts from the run's states

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Undo what a call of the reward inside the context changes in the process."""
        runs = _random_states()
        if self._states is not None:
            _set_random_states(self._states)
        with _working_folder_kept(), restored(self._tell):
            try:
                yield
            finally:
                self._states = _random_states()
                _set_random_states(runs)

    def _tell(self, change: str) -> None:
        if change not in self._told:
            self._told.add(change)
            warnings.warn(
                f"the reward changed {change}, which the run depends on: it is restored after each "
                "call. Change it only inside the reward, or run the reward in separate processes "
                "(`RewardFunction`).",
                stacklevel=4,
            )


def _random_states() -> tuple[Any, Any, torch.Tensor]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_random_states(states: tuple[Any, Any, torch.Tensor]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@contextmanager
def _working_folder_kept() -> Iterator[None]:
    """Return to the working folder at the end: the run's relative paths start there."""
    # O_PATH (Linux) also opens a folder that the user may not list.
    here = os.open(".", getattr(os, "O_PATH", os.O_RDONLY))
    try:
        yield
    finally:
        os.fchdir(here)
        os.close(here)
