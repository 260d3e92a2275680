"""Checks that an engine with other model code computes the student's log-probabilities.

Two implementations of an architecture can differ, and a push can lose weights. We compare a few
tokens after the first push, before the engine samples for the run.

Weights that are all zero or all one can hide a difference until training changes them, e.g. a bias
that an engine does not add. So the first comparison changes these weights a little.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kdrl_lightning.common.untyped import HFTokenizer
from kdrl_lightning.engines.base import RolloutEngine, Sampling, noise_seed
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rollout_batch import RolloutBatch, collate

TEXT = "Solve it step by step: 12 + 30 = 42, because 10 + 30 = 40 and 40 + 2 = 42. Now 7 * 8 = "
TOKENS = 12  # of each completion
SHARES = (1.0, 0.5, 0.2)  # of the text: prompts of different lengths
MOVE = 0.1  # standard deviation of the noise added to equal weights
AS_THEY_ARE = "the same weights"
MOVED = "the same weights, after a small change of those that are all equal in their tensor"


def bound_of(precision: str, dtype: torch.dtype | None) -> float:
    """Return how far apart log-probabilities may be on average, in nats.

    Args:
        precision: the trainer's, e.g. ``bf16-mixed``.
        dtype: dtype that the engine computes in; None: the trainer's.

    >>> bound_of("32-true", torch.float32), bound_of("bf16-mixed", None)
    (0.001, 0.1)
    """
    narrow = dtype in (torch.bfloat16, torch.float16) or "16" in precision
    return 0.1 if narrow else 0.001


def equal_weights(model: nn.Module) -> list[Tensor]:
    """Return the trained parameters whose values are all equal; of a sharded one, the local shard.

    >>> [tuple(p.shape) for p in equal_weights(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)))]
    [(2,), (2,)]
    """
    trained = (p.detach() for p in model.parameters() if p.requires_grad)
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in trained)
    return [part for part in parts if part.numel() and _all_equal(part)]


def _all_equal(values: Tensor) -> bool:
    flat = values.reshape(-1)
    # The first values of most tensors differ, so we need not read the rest.
    return all(bool((some == flat[0]).all()) for some in (flat[:64], flat))


@contextmanager
def moved(parts: Iterable[Tensor]) -> Iterator[None]:
    """Add noise to parameters inside the context, the same on each rank if they are not sharded.

    Args:
        parts: parameters or local shards, which are changed in place and restored exactly.
    """
    before = [(part, part.clone()) for part in parts]
    draw = torch.Generator().manual_seed(0)
    try:
        for part, _ in before:
            part += MOVE * torch.randn(part.shape, generator=draw).to(part)
        yield
    finally:
        for part, value in before:
            part.copy_(value)


def probe(engine: RolloutEngine, tokenizer: HFTokenizer, rows: int, context: int) -> RolloutBatch:
    """Return a batch of short completions that an engine samples after a built-in text.

    Args:
        engine: an engine that holds weights.
        tokenizer: the student's.
        rows: the student's vocabulary size; token ids stay below it.
        context: longest prompt and completion together, in tokens.
    """
    known = [i for i in tokenizer.encode(TEXT, add_special_tokens=False) if 0 <= i < rows]
    known = known or list(range(min(rows, 32)))  # no word of the text is in the vocabulary
    tokens = min(TOKENS, max(context // 2, 1))
    known = known[: max(context - tokens, 1)]
    prompts = [known[: max(int(len(known) * share), 1)] for share in SHARES]
    seeds = [[noise_seed(0, i, k) for k in range(2)] for i in range(len(prompts))]
    groups = engine.generate(prompts, seeds, Sampling(tokens))
    made = [(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]
    return collate(
        [p for p, _ in made],
        [c.ids for _, c in made],
        list(range(len(made))),
        pad_id=0,
        policy_version=[engine.version or 0] * len(made),
        rollout_logprobs=[c.logprobs for _, c in made],
    ).replace(engine_exact=engine.exact)


def require_agreement(
    engine: RolloutEngine,
    architecture: str,
    scored: RolloutBatch,
    bound: float,
    weights: str = AS_THEY_ARE,
) -> None:
    """Refuse an engine whose log-probabilities are not the student's.

    Args:
        engine: the engine that sampled.
        architecture: class name of the student.
        scored: completions with the engine's and the student's log-probabilities.
        bound: largest mean absolute difference, in nats.
        weights: description of the weights of both, for the message.

    Raises:
        ConfigurationError: the log-probabilities differ by more than ``bound``.
    """
    theirs, ours = scored.rollout_logprobs, scored.old_logprobs
    assert isinstance(theirs, Tensor) and isinstance(ours, Tensor)
    mean = float((theirs - ours).abs()[scored.completion_mask].mean())
    if not mean <= bound:  # NaN, too
        raise ConfigurationError(
            f"`rollout_engine` must give the student's log-probabilities within {bound:g} nats on "
            f"average: got {type(engine).__name__}, which is {mean:.2g} away for {architecture} "
            f"with {weights}. vLLM computes this architecture differently, or does not load all of "
            "its weights. Use TransformersEngine, or raise `weight_sync.max_mean_diff`."
        )
