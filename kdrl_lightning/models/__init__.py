"""Models, trained and frozen: loading, scoring, sharding, weights and adapters."""

from kdrl_lightning import _moved

# Names that modules of 0.1 had here.
__getattr__ = _moved.names_of("kdrl_lightning.models.loading")
