"""A small argument parser that imports no torch, for subcommands without a trainer."""

from __future__ import annotations

import argparse
from typing import NoReturn

from kdrl_lightning.errors import ConfigurationError


class PlainParser(argparse.ArgumentParser):
    """Raises a ``ConfigurationError`` instead of printing usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise a one-line error.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(f"{message} (see `{self.prog} --help`)")
