"""``python -m kdrl_lightning``: the command line, with a user's mistake as one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kdrl_lightning.errors import ConfigurationError, TrainingStopped


def main(args: Sequence[str] | None = None) -> None:
    """Run a subcommand; exit with 2 on a user's mistake, 1 where training cannot go on."""
    from kdrl_lightning.cli import KDRLCLI

    try:
        KDRLCLI.run(args)
    except ConfigurationError as error:
        _exit(error, 2)
    except TrainingStopped as error:
        _exit(error, 1)


def _exit(error: Exception, code: int) -> None:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
