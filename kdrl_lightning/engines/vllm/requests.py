"""Checks requests to vLLM and its answers, for the engine in this process and for servers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from kdrl_lightning.common.untyped import HFConfig, HFModel, Tree
from kdrl_lightning.engines.base import Completion, Sampling
from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.models.architectures.rotary import switch_lengths
from kdrl_lightning.models.end_tokens import first_end


def check_requests(
    prompts: Sequence[list[int]], sampling: Sampling, vocab_size: int, context: int
) -> None:
    """Refuse prompts that vLLM cannot sample from; an unknown token id would crash it.

    Args:
        prompts: P lists of token ids.
        sampling: its ``max_tokens`` is the longest completion.
        vocab_size: number of ids; each must be below it.
        context: longest prompt and completion together, in tokens.

    Raises:
        TrainingStopped: a prompt is empty, too long, or holds an id outside the vocabulary.
    """
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise TrainingStopped(
                f"a prompt must have at least one token: got none in row {i}. Check the prompts."
            )
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
                "shorten the prompt or the completion."
            )


def limits(sampling: Sampling) -> Tree:
    """Return the limits on the sampled tokens, under vLLM's names."""
    return {"top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p}


def context_of(config: HFConfig, max_model_len: int | None) -> int:
    """Return the longest prompt and completion together that vLLM must hold, in tokens.

    Args:
        config: configuration of the text model.
        max_model_len: the user's limit; None: the model's context.

    Raises:
        ConfigurationError: the limit exceeds the model's context, or neither is known.
    """
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if max_model_len is None and positions is None:
        raise ConfigurationError(
            "`max_model_len` must be given for a model that does not name its context: got None. "
            "Set it to the longest prompt and completion together."
        )
    if positions is not None and max_model_len is not None and max_model_len > positions:
        raise ConfigurationError(
            f"`max_model_len` must be at most the model's context of {positions} tokens: got "
            f"{max_model_len}. Lower it."
        )
    return max_model_len or positions or 0


def warn_of_one_rotary(model: HFModel, context: int) -> None:
    """Warn if vLLM and the trainer use different rotary embeddings for short rows.

    longrope has two embeddings. vLLM uses the same one for all rows, chosen by its context length.

    Args:
        model: the student.
        context: vLLM's longest sequence, in tokens.
    """
    for limit, always in switch_lengths(model):
        if not always and context > limit:
            warnings.warn(
                f"vLLM uses the rotary embedding of {type(model).__name__} for more than {limit} "
                f"tokens in rows of any length, because `max_model_len` is {context}: its "
                "log-probabilities of shorter rows differ from the trainer's. Set `max_model_len` "
                f"to {limit} if prompts with their completions fit.",
                stacklevel=3,
            )


def completion(ids: list[int], logprobs: list[float], ends: Sequence[int]) -> Completion:
    """Return a ``Completion`` after checking vLLM's answer.

    Args:
        ids: sampled token ids.
        logprobs: log-probability of each token, in nats.
        ends: the end tokens.

    Raises:
        TrainingStopped: lengths differ, nothing was sampled, or something follows the end token.
    """
    end = first_end(ids, ends)
    if not ids or len(ids) != len(logprobs) or end != len(ids):
        raise TrainingStopped(
            f"vLLM must return one log-probability per token and nothing after an end token of "
            f"{list(ends)}: got {len(ids)} tokens {ids[:8]}, {len(logprobs)} log-probabilities. "
            "Check the version of vLLM."
        )
    return Completion(ids, logprobs, truncated=ids[-1] not in ends)
