"""``python -m kdrl_lightning``: the command line, with a user's mistake as one line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from kdrl_lightning.errors import ConfigurationError, Interrupted, TrainingStopped


def main(args: Sequence[str] | None = None) -> None:
    """Run a subcommand.

    Exit with 2 on a user's mistake, 1 where training cannot go on, 143 where SIGTERM stopped it.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from kdrl_lightning.cli import KDRLCLI
    from kdrl_lightning.evaluate import evaluate
    from kdrl_lightning.serve import serve

    try:
        given = sys.argv[1:] if args is None else list(args)
        if given[:1] == ["export"]:
            run_export(given[1:])
        elif given[:1] == ["evaluate"]:
            evaluate(given[1:])
        elif given[:1] == ["serve"]:
            serve(given[1:])
        else:
            KDRLCLI.run(args)
    except Interrupted as error:
        _exit(error, 128 + signal.SIGTERM)
    except SIGTERMException as error:  # before the first step, or without training
        _exit(Interrupted("stopped by SIGTERM: nothing was saved."), 128 + signal.SIGTERM, error)
    except TrainingStopped as error:
        _exit(error, 1)
    except MisconfigurationException as error:
        _exit(error, 2)
    except Exception as error:
        mistake = _mistake_behind(error)
        if mistake is None:
            raise
        _exit(mistake, 2)


def run_export(args: Sequence[str]) -> None:
    """Run the subcommand that needs no trainer."""
    from jsonargparse import auto_cli

    from kdrl_lightning import config_base
    from kdrl_lightning.cli import quiet
    from kdrl_lightning.export import export
    from kdrl_lightning.parser import OneLineParser

    quiet()
    config_base.install()
    auto_cli(
        export,
        args=list(args),
        prog="python -m kdrl_lightning export",
        description="Write a checkpoint's student, with its tokenizer, as a Hugging Face folder.",
        as_positional=False,
        allow_abbrev=False,
        parser_class=OneLineParser,
    )


def _mistake_behind(error: BaseException | None) -> ConfigurationError | None:
    """Find the user's mistake where a parser has wrapped it in errors of its own."""
    while error is not None and not isinstance(error, ConfigurationError):
        error = error.__cause__ or error.__context__
    return error


def _exit(error: Exception, code: int, cause: BaseException | None = None) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(code) from cause or error


if __name__ == "__main__":
    main()
