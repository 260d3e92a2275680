"""From prompts to micro-batches: sampling, groups, statistics, and the cut into updates."""

from kdrl_lightning import _moved

# Version 0.1 had modules of `engines` here; their names still work.
__getattr__ = _moved.names_of("kdrl_lightning.engines")
