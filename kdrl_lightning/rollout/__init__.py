"""From prompts to rollout batches: sampling, groups, statistics, the cut into micro-batches."""

from kdrl_lightning import _moved

# Names that modules of 0.1 had here.
__getattr__ = _moved.names_of("kdrl_lightning.engines")
