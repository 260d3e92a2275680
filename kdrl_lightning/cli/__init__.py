"""The command line: subcommands, the parser, and layers of YAML."""

from kdrl_lightning import _moved

# Names that modules of 0.1 had here.
__getattr__ = _moved.names_of("kdrl_lightning.cli.main")
