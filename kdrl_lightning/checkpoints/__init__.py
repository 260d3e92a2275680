"""Checkpoint files: writing, reading, resuming, and finding damage."""

from kdrl_lightning.common import old_names

# Names that modules of 0.1 had here.
__getattr__ = old_names.names_of(
    "kdrl_lightning.checkpoints.writer",
    "kdrl_lightning.checkpoints.reader",
    "kdrl_lightning.checkpoints.layout",
    "kdrl_lightning.trainer.failures",
)
