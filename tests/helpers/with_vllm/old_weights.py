"""An engine that keeps the first weights, and says that it has the newest."""

from __future__ import annotations

from kdrl_lightning.engines import VLLMEngine
from kdrl_lightning.models.weights import ModelWeights


class OldWeights(VLLMEngine):
    def update_weights(self, weights: ModelWeights, version: int) -> None:
        if self.version is None:
            super().update_weights(weights, version)
        self.version = version
