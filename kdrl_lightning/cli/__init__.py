"""The command line: subcommands, the parser, and layers of YAML."""

from kdrl_lightning.common import old_names

# Names that modules of 0.1 had here.
__getattr__ = old_names.names_of("kdrl_lightning.cli.main")
