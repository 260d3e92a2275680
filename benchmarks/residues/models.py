"""Teacher and student of the residues: the embedded models' recipe on other traces."""

from __future__ import annotations

from benchmarks.residues.task import ResidueTraces
from kdrl_lightning.tiny import TinyModel


class ResidueModel(TinyModel):
    """A model source for residues: trains the model on first use, then caches it.

    The arguments are those of ``TinyModel``; ``slip`` is the probability that a digit is left out.
    """

    @property
    def recipe_name(self) -> str:
        """Name of the settings that determine the weights."""
        return super().recipe_name.replace("addition", "residues")

    def traces(self, size: int) -> ResidueTraces:
        """Return the worked problems that the model is trained on."""
        return ResidueTraces(size, self.seed, self.digits, self.slip)
