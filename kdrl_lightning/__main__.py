"""Runs ``python -m kdrl_lightning``, and prints a user's mistake as one line."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from kdrl_lightning.errors import (
    ConfigurationError,
    Interrupted,
    TrainingStopped,
    disk_error,
    path_error,
)

LONGEST = 1000
FIRST_S = 2.0  # seconds that other processes wait for the first one to report Ctrl-C


def main(args: Sequence[str] | None = None) -> None:
    """Run a subcommand.

    The process exits with 2 on a user's mistake, 1 if training cannot continue, 143 if SIGTERM
    stopped it, and 130 if Ctrl-C did.
    """
    try:
        _run(args)
    except KeyboardInterrupt as error:
        _exit_on_ctrl_c(error)
    except (SystemExit, Exception) as error:
        # After Ctrl-C Lightning exits with 1, or its shutdown of the run raises another error.
        pressed = _ctrl_c_in(error)
        if pressed is not None:
            _exit_on_ctrl_c(pressed)
        raise


def _run(args: Sequence[str] | None) -> None:
    given = sys.argv[1:] if args is None else list(args)
    try:
        if _without_torch(given):
            sys.stdout.flush()
            return
    except ConfigurationError as error:
        _exit(error, 2)
    except BrokenPipeError:  # `... configs | head`: the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from kdrl_lightning.common.distributed import lost_peer
    from kdrl_lightning.trainer.checks.devices import memory_error

    try:
        _subcommand(given, args)
    except Interrupted as error:  # on all ranks
        if int(os.environ.get("LOCAL_RANK") or 0) > 0:
            # Lightning kills the first process of a node if another one fails before it has ended.
            raise SystemExit(0) from error
        _exit(error, 128 + error.number)
    except SIGTERMException as error:  # before the first step, or outside of training
        _exit(Interrupted("stopped by SIGTERM: nothing was saved."), 128 + signal.SIGTERM, error)
    except TrainingStopped as error:
        _exit_if_interrupted(error)
        _exit(error, 1)
    except MisconfigurationException as error:
        _exit(error, 2)
    except Exception as error:
        _exit_if_interrupted(error)
        mistake = _mistake_in(error) or path_error(error)
        if mistake is not None:
            _exit(mistake, 2)
        lost = lost_peer(error)
        if lost is not None:
            _exit(lost, 1, error)
        full = memory_error(error)
        if full is not None:
            _exit(full, 1, error)
        disk = disk_error(error)
        if disk is None:
            raise
        text = f"the run must be able to use its files: got {type(disk).__name__}: {disk}. Make "
        cure = "room, or correct the permissions, and continue with `--ckpt_path last`."
        _exit(TrainingStopped(text + cure), 1, error)


def _subcommand(given: Sequence[str], args: Sequence[str] | None) -> None:
    from kdrl_lightning.cli.evaluate import evaluate
    from kdrl_lightning.cli.main import KDRLCLI
    from kdrl_lightning.cli.serve import serve
    from kdrl_lightning.trainer.strategies import end_with_children

    if given[:1] == ["export"]:
        run_export(given[1:])
    elif given[:1] == ["evaluate"]:
        evaluate(given[1:])
    elif given[:1] == ["serve"]:
        serve(given[1:])
    elif given[:1] == ["doctor"]:
        from kdrl_lightning.cli.doctor import doctor

        raise SystemExit(doctor(given[1:]))
    elif given[:1] == ["plan"]:
        from kdrl_lightning.cli.plan import plan

        plan(given[1:])
    else:
        end_with_children()
        KDRLCLI.run(args)


def _without_torch(given: Sequence[str]) -> bool:
    """Run the subcommand if it does not need torch, which takes seconds to import.

    Returns:
        Whether it was run.
    """
    from kdrl_lightning.cli.help import help_text

    text = help_text(given)
    if text is not None:
        print(text)
        return True
    if given[0] == "configs":
        from kdrl_lightning.cli.configs import configs

        configs(given[1:])
        return True
    return False


def run_export(args: Sequence[str]) -> None:
    """Parse the arguments of ``export`` and run it, without a trainer."""
    from jsonargparse import auto_cli

    from kdrl_lightning.cli import layered_yaml, quiet
    from kdrl_lightning.cli.export import export
    from kdrl_lightning.cli.parser import OneLineParser

    quiet()
    layered_yaml.install()
    auto_cli(
        export,
        args=list(args),
        prog="python -m kdrl_lightning export",
        description="Write a checkpoint's student, with its tokenizer, as a Hugging Face folder.",
        as_positional=False,
        allow_abbrev=False,
        parser_class=OneLineParser,
    )


def _exit_on_ctrl_c(error: KeyboardInterrupt) -> NoReturn:
    words = str(error) or "stopped by Ctrl-C: nothing was saved."
    _exit(Interrupted(words, signal.SIGINT), 128 + signal.SIGINT, error, FIRST_S)


def _ctrl_c_in(error: BaseException | None) -> KeyboardInterrupt | None:
    """Return the Ctrl-C that was being handled when ``error`` was raised; None without one."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error


def _exit_if_interrupted(error: Exception) -> None:
    """Exit with a signal's code if the signal caused the error; see ``StopSignals.explain``."""
    signalled = getattr(error, "interrupted", None)
    if isinstance(signalled, Interrupted):
        _exit(signalled, 128 + signalled.number, error)


def _mistake_in(error: BaseException | None) -> ConfigurationError | None:
    """Return the user's mistake, which a parser may have wrapped in other errors."""
    while error is not None and not isinstance(error, ConfigurationError):
        error = error.__cause__ or error.__context__
    return error


def _first_to_say(words: str, waits_s: float) -> bool:
    if "torch" not in sys.modules:  # so there is no process group
        return True
    from kdrl_lightning.common.distributed import first_to_say

    return first_to_say(words, waits_s)


def _exit(
    error: Exception, code: int, cause: BaseException | None = None, waits_s: float = 0.0
) -> NoReturn:
    words = " ".join(str(error).split())
    if len(words) > LONGEST:  # e.g. a parser's message that quotes a whole file
        words = f"{words[: LONGEST // 2]} ... {words[-LONGEST // 2 :]}"
    if _first_to_say(words, waits_s):
        # The screen may show the first process's progress bar, without a line break after it.
        start = "\n" if int(os.environ.get("LOCAL_RANK") or 0) > 0 else ""
        print(f"{start}error: {words}", file=sys.stderr)
    raise SystemExit(code) from cause or error


def command() -> None:
    """Run a subcommand, then ignore Ctrl-C until the process ends: the program's entry point."""
    # Runs after the handler that Lightning registers later, which lets Ctrl-C kill the process.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    try:
        main()
    finally:
        # The work is done; while Python shuts down, Ctrl-C would end the process without a message.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    command()
