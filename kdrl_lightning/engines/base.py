"""The interface of sampling engines, which the data module calls."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kdrl_lightning.models.weights import ModelWeights

RENAMED = {"beside": "supports_async", "fixed": "has_own_weights"}


@dataclass(frozen=True)
class Sampling:
    """How to sample: length, temperature and which tokens are allowed.

    Evaluations may leave out improbable tokens. Rollouts never do, because that would bias the
    ratios of the loss.

    Attributes:
        max_tokens: longest completion, the end token included.
        temperature: 0 is greedy.
        top_p: sample from the most likely tokens that together have this probability; 1: all.
        top_k: sample from this many of the most likely tokens; 0: all.
        min_p: leave out tokens with less than this share of the largest probability.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether every token of the vocabulary can be sampled."""
        return self.top_p >= 1.0 and not self.top_k and self.min_p <= 0.0


@dataclass(frozen=True)
class Completion:
    """One sampled completion, as token ids of the engine.

    Attributes:
        ids: sampled tokens; the end token, if reached, is the last.
        logprobs: log-probability of each token in the distribution that it was sampled from (at
            temperature 1 if greedy).
        truncated: whether the token limit cut it off.
        version: ``policy_version`` of the weights that sampled it; None: the engine's version.
    """

    ids: list[int]
    logprobs: list[float]
    truncated: bool
    version: int | None = None


class RolloutEngine(ABC):
    """Base class of engines: samples completions, by default from the student's current weights.

    Attributes:
        version: the ``policy_version`` of the weights that it holds; None before the first push.
        exact: its log-probabilities equal the trainer's, so the loss needs no importance weights.
        supports_async: it samples outside the training process, from a copy of the weights, so a
            thread may call it while the student trains.
        has_own_weights: it samples from other weights than the student's; we push none to it.
        dtype: the dtype that it computes in; None: the trainer's.
        compared: it runs other code than the student, so we compare its log-probabilities with
            the student's after the first push, before it samples for the run.
        context: longest prompt and completion together, in tokens; None: the student's limit.
        one_per_process: a process cannot hold two of these engines.
    """

    version: int | None = None
    exact: bool = True
    supports_async: bool = False
    has_own_weights: bool = False
    dtype: torch.dtype | None = None
    compared: bool = False
    context: int | None = None
    one_per_process: bool = False

    def __init_subclass__(cls) -> None:
        """Accept attributes of a subclass under their names of 0.1, with a warning."""
        super().__init_subclass__()
        for old, new in RENAMED.items():
            if old in vars(cls):
                warnings.warn(
                    f"`{cls.__name__}.{old}` must be called `{new}`: 0.3 removes the old name.",
                    FutureWarning,
                    stacklevel=2,
                )
                setattr(cls, new, vars(cls)[old])

    def refused_lengths(self, path: str, max_tokens: int) -> list[tuple[range, str]]:
        """Return the prompt lengths that the engine cannot complete; called before models load.

        Args:
            path: folder or hub name of the model.
            max_tokens: longest completion.

        Returns:
            Ranges of prompt lengths in tokens, each with the reason. Most engines refuse none.
        """
        return []

    def prepare(self, path: str, longest: int, device: torch.device) -> None:  # noqa: B027
        """Check that the engine can serve a run on this device; called before models load.

        Args:
            path: folder or hub name of the model.
            longest: longest prompt and completion together, in tokens.
            device: the device of the model on this rank.

        Raises:
            ConfigurationError: the engine cannot. Most engines raise nothing.
        """

    @abstractmethod
    def setup(
        self, weights: ModelWeights, eos_token_id: int | Sequence[int], pad_token_id: int
    ) -> None:
        """Get ready to sample from a model; the weights come later, with ``update_weights``.

        Args:
            weights: gives access to the model and its weights.
            eos_token_id: the token that ends a completion, or several.
            pad_token_id: the token that pads rows.
        """

    @abstractmethod
    def update_weights(self, weights: ModelWeights, version: int) -> None:
        """Load the student's weights and store their version."""

    @abstractmethod
    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[list[int]], sampling: Sampling
    ) -> list[list[Completion]]:
        """Sample one completion per seed for each prompt.

        A completion's noise is a function of its seed alone: neither the rank nor the other
        prompts of the call change what is drawn.

        Args:
            prompts: P token lists.
            seeds: P lists of seeds, one seed per completion.
            sampling: length, temperature and which tokens are allowed.

        Returns:
            P lists of completions, in the order of the seeds.
        """

    def release(self) -> None:  # noqa: B027 (most engines hold nothing)
        """Free memory for the updates; ``update_weights`` is called before the next rollout."""

    def close(self) -> None:  # noqa: B027 (most engines start nothing)
        """Stop what ``setup`` started and free its memory; the next ``setup`` starts it again."""


def noise_seed(*key: int) -> int:
    """Mix non-negative integers into one 63-bit seed.

    >>> noise_seed(0, 1, 2) == noise_seed(0, 1, 2) != noise_seed(0, 2, 1)
    True
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
