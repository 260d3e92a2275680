"""Models, trained and frozen: loading, scoring, sharding, weights and adapters."""

from kdrl_lightning.common import old_names

# Names that modules of 0.1 had here.
__getattr__ = old_names.names_of("kdrl_lightning.models.loading")
