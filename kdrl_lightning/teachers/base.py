"""What the module asks of a teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from kdrl_lightning.rollout_batch import RolloutBatch
from kdrl_lightning.weights import ModelWeights


class Teacher(ABC):
    """Scores the student's tokens. A plain object, so that no optimizer or checkpoint sees it."""

    @abstractmethod
    def prepare(self) -> None:
        """Make or fetch what is needed; called on one process, before anything is loaded."""

    @abstractmethod
    def check(self, student_tokenizer: Any, student_path: str) -> None:
        """Raise ``ConfigurationError`` unless token ids mean the same to student and teacher."""

    @abstractmethod
    def load(self, device: torch.device) -> None:
        """Load the weights; a second call only moves them."""

    @abstractmethod
    def score(self, batch: RolloutBatch) -> Tensor:
        """``[B, T]`` log-probabilities of the sampled tokens, without gradient, 0 on padding."""

    def weights(self) -> ModelWeights | None:
        """Return the weights if they are at hand, so that the teacher can be evaluated."""
        return None
