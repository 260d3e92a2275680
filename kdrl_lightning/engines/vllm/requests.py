"""What vLLM is asked and what it answers, in process and by server alike."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from kdrl_lightning.engines.base import Completion, Sampling
from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.models.architectures.rotary import switch_lengths
from kdrl_lightning.models.end_tokens import first_end


def check_requests(
    prompts: Sequence[list[int]], sampling: Sampling, vocab_size: int, context: int
) -> None:
    """Refuse what vLLM cannot take: an unknown id would bring its engine down.

    Args:
        prompts: P token lists.
        sampling: length and temperature.
        vocab_size: ids are below it.
        context: longest prompt and completion together, in tokens.

    Raises:
        TrainingStopped: a prompt is empty, too long, or holds an id outside the vocabulary.
    """
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise TrainingStopped(f"a prompt must have at least one token: got none in row {i}.")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            wrong = next(t for t in prompt if not 0 <= t < vocab_size)
            raise TrainingStopped(
                f"the ids of a prompt must be in [0, {vocab_size - 1}]: got {wrong} in row {i}. "
                "Check that the tokenizer is the student's."
            )
        if len(prompt) + sampling.max_tokens > context:
            raise TrainingStopped(
                f"prompt and `max_tokens` must fit the engine's {context} tokens: got "
                f"{len(prompt)} + {sampling.max_tokens} in row {i}. Raise `max_model_len`, or "
                "shorten one of them."
            )


def context_of(config: Any, max_model_len: int | None) -> int:
    """Return the longest sequence: the given one, at most what the model was made for.

    Raises:
        ConfigurationError: it is longer than the model's context, or neither is known.
    """
    own: int | None = getattr(config, "max_position_embeddings", None)
    if max_model_len is None and own is None:
        raise ConfigurationError(
            "`max_model_len` must be given for a model that does not name its context: got None."
        )
    if own is not None and max_model_len is not None and max_model_len > own:
        raise ConfigurationError(
            f"`max_model_len` must be at most the model's context of {own} tokens: got "
            f"{max_model_len}."
        )
    return max_model_len or own or 0


def warn_of_one_rotary(model: Any, context: int) -> None:
    """Warn if vLLM embeds positions of short rows otherwise than the trainer does.

    Of longrope's two embeddings it takes one for all rows, by its longest sequence.

    Args:
        model: the student.
        context: vLLM's longest sequence.
    """
    for limit, always in switch_lengths(model):
        if not always and context > limit:
            warnings.warn(
                f"vLLM takes the rotary embedding of {type(model).__name__} for more than {limit} "
                f"tokens in rows of any length, as `max_model_len` is {context}: its "
                "log-probabilities of shorter rows are not the trainer's. Set `max_model_len` to "
                f"{limit} if prompts with their completions fit.",
                stacklevel=3,
            )


def completion(ids: list[int], logprobs: list[float], ends: Sequence[int]) -> Completion:
    """Build a completion, checked to be one.

    Args:
        ids: sampled tokens.
        logprobs: of each.
        ends: the end tokens.

    Raises:
        TrainingStopped: lengths differ, nothing was sampled, or something follows the end token.
    """
    end = first_end(ids, ends)
    if not ids or len(ids) != len(logprobs) or end != len(ids):
        raise TrainingStopped(
            f"vLLM must return one log-probability per token and nothing after an end token of "
            f"{list(ends)}: got {len(ids)} tokens {ids[:8]}, {len(logprobs)} log-probabilities."
        )
    return Completion(ids, logprobs, truncated=ids[-1] not in ends)
