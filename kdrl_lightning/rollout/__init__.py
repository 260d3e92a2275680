"""From prompts to micro-batches: sampling, groups, statistics, and the split into updates."""

from kdrl_lightning.common import old_names

# Version 0.1 had modules of `engines` here; their names still work.
__getattr__ = old_names.names_of("kdrl_lightning.engines")
