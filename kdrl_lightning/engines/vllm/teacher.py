"""Sampling the teacher's completions on vLLM servers that serve the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from kdrl_lightning.common.distributed import agreed
from kdrl_lightning.engines.http_client import ServerClient
from kdrl_lightning.engines.vllm.server import VLLMServerEngine
from kdrl_lightning.models.end_tokens import as_ids
from kdrl_lightning.models.weights import ModelWeights


class VLLMTeacherEngine(VLLMServerEngine):
    """Samples from the model that vLLM servers hold, e.g. the servers of a ``ServerTeacher``.

    The engine never sends weights, so any ``vllm serve`` works.

    Args:
        urls: addresses of the servers, e.g. ``http://127.0.0.1:8001``.
        api_key: key of the servers; None: the environment variable ``VLLM_API_KEY``.
        timeout_s: longest wait for one answer, in seconds.
        max_away_s: how long a server may be unreachable, restarts included, in seconds.
        max_sequences: concurrent requests to each server.
    """

    has_own_weights = True
    compared = False

    def __init__(
        self,
        urls: Sequence[str],
        api_key: str | None = None,
        timeout_s: float = 600.0,
        max_away_s: float = 120.0,
        max_sequences: int = 128,
    ) -> None:
        super().__init__(
            urls,
            api_key,
            timeout_s=timeout_s,
            max_away_s=max_away_s,
            max_sequences=max_sequences,
        )

    def setup(
        self, weights: ModelWeights, eos_token_id: int | Sequence[int], pad_token_id: int
    ) -> None:
        """Read every server's context length, and the vocabulary size from ``weights``.

        Raises:
            TrainingStopped: a server does not answer.
        """
        self._ends = as_ids(eos_token_id)
        of_student = int(weights.model.config.get_text_config().vocab_size)
        self._vocab_size = weights.vocab_size or of_student
        self.context = agreed(self._shortest)

    def _shortest(self) -> int:
        """Return the shortest context of the servers."""
        cards = [s.patiently(partial(s.get, "/v1/models"))["data"][0] for s in self._servers]
        return min(int(card["max_model_len"]) for card in cards)

    def update_weights(self, weights: ModelWeights, version: int) -> None:
        """Store the version; the servers keep their weights."""
        self.version = version

    def _holds(self, server: ServerClient) -> bool:
        return True
