"""``python -m kdrl_lightning``: the command line, with a user's mistake as one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from kdrl_lightning.errors import ConfigurationError, TrainingStopped


def main(args: Sequence[str] | None = None) -> None:
    """Run a subcommand; exit with 2 on a user's mistake, 1 where training cannot go on."""
    given = sys.argv[1:] if args is None else list(args)
    if given[:1] == ["serve"]:  # no trainer, so no LightningCLI
        from kdrl_lightning.serve import serve

        try:
            serve(given[1:])
        except ConfigurationError as error:
            _exit(error, 2)
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from kdrl_lightning.cli import KDRLCLI

    try:
        KDRLCLI.run(args)
    except TrainingStopped as error:
        _exit(error, 1)
    except MisconfigurationException as error:
        _exit(error, 2)
    except Exception as error:
        mistake = _mistake_behind(error)
        if mistake is None:
            raise
        _exit(mistake, 2)


def _mistake_behind(error: BaseException | None) -> ConfigurationError | None:
    """Find the user's mistake where a parser has wrapped it in errors of its own."""
    while error is not None and not isinstance(error, ConfigurationError):
        error = error.__cause__ or error.__context__
    return error


def _exit(error: Exception, code: int) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(code) from error


if __name__ == "__main__":
    main()
