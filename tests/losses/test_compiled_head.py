"""The head's functions of a chunk through ``torch.compile``, which GPUs use, on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from helpers.reference import close, normal
from kdrl_lightning.losses import logprobs, reverse_kl, token_scores
from kdrl_lightning.losses.head import chunk_math
from kdrl_lightning.losses.head.compiled import OrPlain
from kdrl_lightning.losses.logprobs import Head, Other, TokenScores

N, H, V = 7, 3, 11
IDS = torch.tensor([0, 10, 3, 3, 7, 1, 9])
WEIGHTS = normal(3, N, seed=5).float()


def loss(scores: TokenScores) -> Tensor:
    fields = (scores.logprobs, scores.entropy, scores.divergence)
    total = sum((w * x).sum() for w, x in zip(WEIGHTS, fields, strict=True) if x is not None)
    assert scores.topk_logprobs is not None and scores.tail_logprobs is not None
    return total + scores.topk_logprobs.exp().sum() * 0.3 + scores.tail_logprobs.exp().sum()


def run(known: Any) -> list[Tensor]:
    """Every value and gradient of a head with all that a head can have."""
    parts = normal(N, H, seed=0), normal(V, H, seed=1), normal(V, seed=2)
    hidden, weight, bias = (x.float().requires_grad_() for x in parts)
    theirs = Other(normal(N, 2, seed=3).float(), Head(normal(V, 2, seed=4).float()), scored=True)
    scores = token_scores(
        hidden,
        Head(weight, bias, scale=2.0, softcap=1.5),
        IDS,
        0.7,
        4,  # the last chunk has fewer
        top_k=2,
        topk_ids=torch.stack([IDS, (IDS + 2) % V], 1),
        other=theirs,
        divergence=reverse_kl,
        loss=known,
    )
    loss(scores).backward()
    assert scores.other is not None
    found = [*scores[:-1], *scores.other, hidden.grad, weight.grad, bias.grad]
    return [x.detach() for x in found if x is not None]


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take the compiled functions on a CPU, and forget them afterwards."""
    chunk_math.compiled_math.cache_clear()
    monkeypatch.setattr(OrPlain, "failed", set())
    monkeypatch.setattr(logprobs, "math_for", lambda _: chunk_math.compiled_math())
    yield
    chunk_math.compiled_math.cache_clear()


# Importing the compiler warns about torch's own files (torch 2.13).
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_compiled_is_plain_in_float32(request: pytest.FixtureRequest) -> None:
    plain = run(loss)
    request.getfixturevalue("compiling")
    counters.clear()
    compiled = run(loss)
    graphs = counters["stats"]["unique_graphs"]
    run(loss)
    assert counters["stats"]["unique_graphs"] == graphs > 0  # nothing is compiled twice
    assert not OrPlain.failed
    assert len(plain) == len(compiled) == 12
    for a, b in zip(compiled, plain, strict=True):
        close(a, b, 1e-5)  # float32


def test_a_failing_compiler_warns_once_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    plain = run(loss)
    request.getfixturevalue("compiling")

    def broken(function: Any, **_: Any) -> Any:
        def fail(*args: Any) -> Any:
            raise RuntimeError("no triton here\nand a long trace")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    words = r"torch\.compile failed on the head of the model: no triton here\. This part runs with"
    with pytest.warns(UserWarning, match=words) as told:
        found = run(loss)
    assert len([x for x in told if "torch.compile" in str(x.message)]) == 1
    for a, b in zip(found, plain, strict=True):
        close(a, b, 1e-5)  # float32


def test_a_full_memory_is_no_failed_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(function: Any, **_: Any) -> Any:
        def fail(*args: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        return fail

    monkeypatch.setattr(torch, "compile", full)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        OrPlain(chunk_math.score, "x")(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))
    assert not OrPlain.failed
