"""An engine that keeps its first weights, but reports the newest version."""

from __future__ import annotations

from kdrl_lightning.engines import VLLMEngine
from kdrl_lightning.models.weights import ModelWeights


class OldWeights(VLLMEngine):
    def update_weights(self, weights: ModelWeights, version: int) -> None:
        if self.version is None:
            super().update_weights(weights, version)
        self.version = version
