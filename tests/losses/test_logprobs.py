"""Log-probabilities of chosen tokens, and entropy, from hidden states, in chunks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.reference import close, f64, log_softmax, normal
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses.logprobs import (
    Head,
    Other,
    auto_chunk_size,
    chosen_logprobs,
    token_scores,
)

N, H, V = 7, 3, 11
IDS = torch.tensor([0, 10, 3, 3, 7, 1, 9])


def parts(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias."""
    return normal(N, H, seed=seed), normal(V, H, seed=seed + 1), normal(V, seed=seed + 2)


def dense(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor = IDS,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int = V,
) -> tuple[Tensor, Tensor]:
    """The whole table of logits, then torch's log_softmax and Categorical."""
    logits = torch.einsum("nh,vh->nv", hidden, weight)
    logits = scale * (logits if bias is None else logits + bias)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits[:, :vocab_size] / temperature
    rows = logits.log_softmax(-1)
    return rows[range(N), ids], Categorical(logits=logits).entropy()


CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 3.0},
    {"bias": False},
    {"scale": 0.25},
    {"softcap": 1.5},
    {"scale": 2.0, "softcap": 0.8, "temperature": 0.5},
    {"vocab_size": 11},
    {"vocab_size": 8},
    {"vocab_size": 8, "scale": 2.0, "softcap": 3.0, "temperature": 1.3},
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(c) or "plain")
@pytest.mark.parametrize("chunk_size", [None, *range(1, N + 2)])
def test_values_and_gradients_match_dense(case: dict[str, Any], chunk_size: int | None) -> None:
    hidden, weight, bias = (x.requires_grad_() for x in parts())
    used = bias if case.get("bias", True) else None
    options = {k: v for k, v in case.items() if k != "bias"}
    temperature = options.pop("temperature", 1.0)
    ids = IDS.clamp(max=options.get("vocab_size", V) - 1)
    head = Head(weight, used, **options)
    got = chosen_logprobs(hidden, head, ids, temperature, chunk_size)
    expected = dense(hidden, weight, used, ids, temperature, **options)
    leaves = [hidden, weight] if used is None else [hidden, weight, bias]
    weights = normal(2, N, seed=5)
    for i in range(2):
        # float64; the contract is 1e-12
        close(got[i], expected[i], 1e-12)
        mine = torch.autograd.grad((got[i] * weights[i]).sum(), leaves, retain_graph=True)
        theirs = torch.autograd.grad((expected[i] * weights[i]).sum(), leaves, retain_graph=True)
        for a, b in zip(mine, theirs, strict=True):
            close(a, b, 1e-12)


def test_values_by_hand() -> None:
    # Logits (0, ln 3) are p = (1/4, 3/4).
    head = Head(f64([[0.0], [math.log(3)]]))
    logprobs, entropy = chosen_logprobs(f64([[1.0], [1.0]]), head, torch.tensor([0, 1]))
    close(logprobs, [math.log(0.25), math.log(0.75)])
    close(entropy, [-0.25 * math.log(0.25) - 0.75 * math.log(0.75)] * 2)
    # At temperature 1/2 they are (0, 2 ln 3), p = (1/10, 9/10).
    logprobs, entropy = chosen_logprobs(f64([[1.0]]), head, torch.tensor([1]), temperature=0.5)
    close(logprobs, [math.log(0.9)])
    close(entropy, [-0.1 * math.log(0.1) - 0.9 * math.log(0.9)])


def test_float32_is_near_float64() -> None:
    hidden, weight, bias = parts(3)
    exact = dense(hidden, weight, bias)
    got = chosen_logprobs(hidden.float(), Head(weight.float(), bias.float()), IDS, chunk_size=2)
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == torch.float32
        close(a, b, 1e-5)  # float32


def test_bfloat16_states_give_float32() -> None:
    hidden, weight, _ = (x.bfloat16() for x in parts(4))
    logprobs, entropy = chosen_logprobs(hidden, Head(weight), IDS)
    assert logprobs.dtype == entropy.dtype == torch.float32
    # The logits themselves are rounded to bfloat16; what follows must not be.
    rows = [log_softmax(row) for row in torch.nn.functional.linear(hidden, weight).tolist()]
    close(logprobs, [row[i] for row, i in zip(rows, IDS.tolist(), strict=True)], 1e-5)  # float32
    close(entropy, [-sum(math.exp(x) * x for x in row) for row in rows], 1e-5)  # float32


def test_without_gradient_gives_the_same() -> None:
    hidden, weight, bias = parts(5)
    head = Head(weight.requires_grad_(), bias)
    with_graph = chosen_logprobs(hidden, head, IDS, chunk_size=3)
    with torch.no_grad():
        without = chosen_logprobs(hidden, head, IDS, chunk_size=3)
    for a, b in zip(with_graph, without, strict=True):
        assert a.requires_grad
        assert not b.requires_grad
        assert torch.equal(a, b)


def test_constant_added_to_the_logits_changes_nothing() -> None:
    hidden, weight, bias = parts(6)
    plain = chosen_logprobs(hidden, Head(weight, bias), IDS)
    moved = chosen_logprobs(hidden, Head(weight, bias + 100.0), IDS)
    for a, b in zip(plain, moved, strict=True):
        close(a, b)


def test_excluded_tokens_leave_entropy_and_gradient_finite() -> None:
    hidden, weight, bias = parts(7)
    leaf = hidden.clone().requires_grad_()
    bias[4] = -math.inf
    logprobs, entropy = chosen_logprobs(leaf, Head(weight, bias), IDS, chunk_size=2)
    kept = [v for v in range(V) if v != 4]
    place = torch.tensor([kept.index(i) for i in IDS.tolist()])
    shorter = chosen_logprobs(hidden, Head(weight[kept], bias[kept]), place)
    close(logprobs, shorter[0])
    close(entropy, shorter[1])
    (gradient,) = torch.autograd.grad((logprobs + entropy).sum(), leaf)
    assert gradient.isfinite().all()
    ids = torch.full_like(IDS, 4)
    assert (chosen_logprobs(hidden, Head(weight, bias), ids)[0] == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_rows_give_nothing_with_a_graph(dtype: torch.dtype) -> None:
    hidden = torch.zeros(0, H, dtype=dtype, requires_grad=True)
    weight = normal(V, H, seed=0).to(dtype).requires_grad_()
    ids = torch.zeros(0, dtype=torch.long)
    logprobs, entropy = chosen_logprobs(hidden, Head(weight), ids)
    assert logprobs.shape == entropy.shape == (0,)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert logprobs.dtype == entropy.dtype == wide
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_temperature_is_refused_unless_above_zero(temperature: float) -> None:
    hidden, weight, _ = parts()
    message = rf"`temperature` must be above 0: got {temperature}\."
    with pytest.raises(ConfigurationError, match=message):
        chosen_logprobs(hidden, Head(weight), IDS, temperature)


@pytest.mark.parametrize("chunk_size", [0, -3])
def test_chunk_size_is_refused_below_one(chunk_size: int) -> None:
    hidden, weight, _ = parts()
    message = rf"`chunk_size` must be at least 1: got {chunk_size}\."
    with pytest.raises(ConfigurationError, match=message):
        chosen_logprobs(hidden, Head(weight), IDS, 1.0, chunk_size)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_no_tensor_has_all_rows_times_the_vocabulary(chunk_size: int, with_bias: bool) -> None:
    rows, width, vocab = 64, 2, 50
    hidden = normal(rows, width, seed=1).requires_grad_()
    weight = normal(vocab, width, seed=2).requires_grad_()
    bias = normal(vocab, seed=3).requires_grad_() if with_bias else None
    ids = torch.arange(rows) % vocab
    with Largest() as forward:
        logprobs, entropy = chosen_logprobs(
            hidden, Head(weight, bias, 2.0, 30.0), ids, 0.9, chunk_size
        )
    with Largest() as backward:
        (logprobs.sum() + entropy.sum()).backward()
    # A chunk of logits, or the head, or the hidden states; nothing else is as large.
    largest = max(chunk_size * vocab, vocab * width, rows * width)
    assert forward.numel <= largest
    assert backward.numel <= largest
    assert (forward.numel == rows * vocab) == (chunk_size == rows)
    assert (backward.numel == rows * vocab) == (chunk_size == rows)


def test_no_logits_are_kept_for_the_backward_pass() -> None:
    rows, width, vocab = 64, 2, 50
    hidden = normal(rows, width, seed=1).requires_grad_()
    weight = normal(vocab, width, seed=2).requires_grad_()
    kept: list[int] = []

    def remember(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        chosen_logprobs(hidden, Head(weight), torch.arange(rows) % vocab, chunk_size=4)
    assert sum(kept) < rows * vocab


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_other_model_computes_in_the_same_type_forward_and_backward(dtype: torch.dtype) -> None:
    seen: list[torch.dtype | None] = []

    class Noting(Head):
        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            on = torch.is_autocast_enabled("cpu")
            seen.append(torch.get_autocast_dtype("cpu") if on else None)
            return super().logits(hidden)

    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    other = Other(torch.randn(3, 4), Noting(torch.randn(5, 4)))

    def gap(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        return (ours.softmax(-1) - theirs.softmax(-1)).square().sum(-1)

    with torch.autocast("cpu", dtype):
        scores = token_scores(
            hidden, Head(weight), torch.tensor([0, 1, 2]), other=other, divergence=gap
        )
    assert scores.divergence is not None
    scores.divergence.sum().backward()
    assert seen == [dtype, dtype]


def test_automatic_chunk_is_used() -> None:
    # 64 MiB of float32 logits at V = 2^21 are 8 rows.
    assert auto_chunk_size(1 << 21) == 8
    assert auto_chunk_size(1 << 30) == 1
    assert auto_chunk_size(2) == 1024
    rows, vocab = 3000, 4
    with Largest() as probe, torch.no_grad():
        chosen_logprobs(
            torch.zeros(rows, 1), Head(torch.zeros(vocab, 1)), torch.zeros(rows, dtype=torch.long)
        )
    assert probe.numel == 1024 * vocab
