"""Compares a scorer with the model's logits and chooses how the scorer runs its rows.

We try every architecture on rows of different lengths, up to just past the lengths at which its
configuration says that it changes. ``probe_length`` skips lengths that are too long to try.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from kdrl_lightning.common.untyped import HFModel
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.architectures.hidden_states import decoder_of
from kdrl_lightning.models.architectures.implementations import keep_soft_caps
from kdrl_lightning.models.architectures.switches import picked_keys, probe_length

# `Any`: torch types an attribute of a module as a tensor or a module.

# Largest accepted difference of log-probabilities: in 32 bits and more, per nat of their spread.
BOUND = 1e-3
# In 16 bits, of a row's mean: single tokens differ by more if other experts are chosen.
BOUND_16 = 0.1
ROUNDING = 3e-6  # rounding error of a log-probability in 32 bits
# Largest accepted effect of later tokens, as a share of the effect of earlier ones. If a model sees
# later tokens, the share is 0.6 or more.
MOST_OF_PAST = 0.03
LEAST = 0.05  # smallest spread in nats: below it, the rounding of the log-softmax would count
WIDE = 50.0  # we scale logits to this size, so that a soft cap has an effect in any model


class Verified(Protocol):
    """The part of ``Scorer`` that ``verify`` uses."""

    model: HFModel
    vocab_size: int | None
    sharded: bool
    computes: torch.dtype | None
    shares: bool
    pads: bool
    at_head: bool

    def head(self) -> Any:
        """Return the language-model head."""

    def alone(self, ids: Tensor) -> Tensor:
        """Return the model's logits ``[S, V]`` of one row of ids ``[S]``."""

    def head_gap(self, ids: Tensor, factor: float) -> float:
        """Return the largest difference of log-probabilities by the scorer's and the model's head.

        In nats; both heads read the row's hidden states, multiplied by ``factor``.
        """

    def chosen(self, rows: list[Tensor], prompts: list[int]) -> list[Tensor]:
        """Return the log-probabilities of the rows' completions, scored in one call."""

    def _shares(self, found: list[Tensor], wanted: list[Tensor], spread: float) -> bool:
        """Return whether log-probabilities with shared prompts equal those of single rows."""


def verify(scorer: Verified, name: str) -> None:
    """Choose attention, padding and prompt sharing so that scores equal those of single rows.

    Args:
        scorer: the scorer to check; we set its ``at_head``, ``pads`` and ``shares``.
        name: the model's name, for messages.

    Raises:
        ConfigurationError: no choice gives right scores, the model sees later tokens, or it does
            not run on token ids alone.
    """
    rows, prompts = probe_rows(scorer)
    try:
        reference = _whole_logits(scorer, rows)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # an architecture's code may raise anything
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigurationError(
            f"the language model {name} must run on token ids alone: got {reason} from "
            f"{type(scorer.model).__name__}. Use another model, or another `dtype`."
        ) from error
    if _ignores_features(scorer, rows[0], reference[0]):
        reference = _whole_logits(scorer, rows)
    spread = spread_of(reference)
    _check_causal(scorer, rows, reference, prompts[0], name)
    _check_head(scorer, rows[-1], reference[-1], name)
    wanted = [
        logits[p - 1 : -1].log_softmax(-1).gather(-1, row[p:, None]).squeeze(-1)
        for logits, row, p in zip(reference, rows, prompts, strict=True)
    ]
    _choose_padding(scorer, rows, prompts, wanted, spread, name)
    # A sharded model never shares: ranks could share different prompts and wait for each other
    # forever. Nor does a float64 model, which serves comparisons to 1e-10: with norms that compute
    # in float32, the order in which gradients are summed would matter.
    if scorer.pads and not (scorer.sharded or scorer.at_head) and _kind(scorer) != torch.float64:
        scorer.shares = True
        try:
            scorer.shares = scorer._shares(scorer.chosen(rows, prompts), wanted, spread)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # architectures refuse an unknown cache with errors of many types
            scorer.shares = False


def probe_rows(scorer: Verified) -> tuple[list[Tensor], list[int]]:
    """Return four rows of ids and the lengths of their prompts.

    The first two differ in their last tokens only; the third has the same prompt.
    """
    device, size = scorer.head().weight.device, scorer.head().weight.shape[0]
    ids = torch.arange(probe_length(scorer.model) + 16, device=device) * 7 + 3
    ids %= min(size, scorer.vocab_size or size)
    long = ids[: max(11, probe_length(scorer.model)) + 6]
    other = torch.cat([long[:-4], long[-4:].flip(0)])
    prompt = len(long) - 6
    return [long, other, long[:-3].clone(), ids[5:12]], [prompt, prompt, prompt, 5]


def _whole_logits(scorer: Verified, rows: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [scorer.alone(row) for row in rows]


def spread_of(logits: list[Tensor]) -> float:
    """Return how much the log-probabilities of a position's tokens differ, in nats, at most 1.

    The logits of an untrained model hardly differ, so wrong ones would look right. We therefore
    judge differences in proportion to this number.

    >>> round(spread_of([torch.tensor([[0.1, -0.1], [0.3, -0.3]])]), 6)
    0.2
    """
    widths = torch.stack([row.float().std(-1, correction=0).mean() for row in logits])
    width = float(widths.mean())
    return min(max(width, LEAST), 1.0) if width == width else 1.0


def close(ours: list[Tensor], theirs: list[Tensor], kind: torch.dtype, spread: float = 1.0) -> bool:
    """Return whether log-probabilities of rows agree within the rounding of the weights' dtype."""
    return largest_gap(ours, theirs, kind, spread) <= (BOUND if kind.itemsize >= 4 else BOUND_16)


def largest_gap(
    ours: list[Tensor], theirs: list[Tensor], kind: torch.dtype, spread: float = 1.0
) -> float:
    """Return the largest difference, in nats; in 16 bits the largest mean over a row.

    NaN if any value is NaN. In 32 bits and more it is the difference per nat of ``spread``; in 16
    bits rounding depends on the size of the logits, not on their spread.

    Args:
        ours: log-probabilities of each row.
        theirs: the reference, in the same shapes.
        kind: dtype of the weights.
        spread: see ``spread_of``.
    """
    gaps = [(a - b).abs() for a, b in zip(ours, theirs, strict=True)]
    if kind.itemsize < 4:
        return float(torch.stack([g.mean() for g in gaps]).max())
    return float(torch.stack([g.max() for g in gaps]).max()) / spread


def _kind(scorer: Verified) -> torch.dtype:
    """Return the type that the scorer computes in, whose rounding its scores have."""
    kind: torch.dtype = scorer.head().weight.dtype
    return scorer.computes or kind


def _ignores_features(scorer: Verified, row: Tensor, reference: Tensor) -> bool:
    """Switch to eager attention if the fast one gives other logits; return whether we did."""
    model = scorer.model
    if keep_soft_caps(model):
        return True
    fast = model.config.get_text_config(decoder=True)._attn_implementation
    if fast != "sdpa":
        return False
    try:
        model.set_attn_implementation("eager")
        eager = _whole_logits(scorer, [row])[0]
    except Exception:  # some architectures have no eager attention
        model.set_attn_implementation(fast)
        return False
    pair = [eager.log_softmax(-1)], [reference.log_softmax(-1)]
    if close(*pair, _kind(scorer), spread_of([reference])):
        model.set_attn_implementation(fast)
        return False
    return True


def _check_causal(
    scorer: Verified, rows: list[Tensor], reference: list[Tensor], prompt: int, name: str
) -> None:
    """Refuse a model that sees later tokens: the first two rows start alike and end differently."""
    first, second = (logits[: prompt + 2].log_softmax(-1) for logits in reference[:2])
    if not first.isfinite().all():
        return  # `_check_head` reports NaN and infinity
    after, kind = largest_gap([first], [second], _kind(scorer)), _kind(scorer)
    near = prompt - 2
    before = torch.cat([rows[0][: near - 4], rows[0][near - 4 : near].flip(0), rows[0][near:]])
    (other,) = _whole_logits(scorer, [before])
    past = largest_gap([first[near:]], [other[near : prompt + 2].log_softmax(-1)], kind)
    # An untrained model hardly looks at other tokens: we compare with the effect of earlier ones.
    small = kind.itemsize < 4 or after <= max(ROUNDING, past * MOST_OF_PAST)
    if small and after <= (BOUND if kind.itemsize >= 4 else BOUND_16):
        return
    raise ConfigurationError(
        f"the language model {name} must not see later tokens: got log-probabilities of "
        f"{type(scorer.model).__name__} that change with the tokens after them. Use a causal "
        "model (an encoder of the BERT family needs `is_decoder: true` in its configuration)."
    )


def _check_head(scorer: Verified, row: Tensor, reference: Tensor, name: str) -> None:
    """Choose the states that the head reads: the decoder's output, else the head's input."""
    largest = float(reference.abs().max())
    factor = max(1.0, WIDE / largest) if largest == largest and largest > 0 else 1.0
    bound = BOUND
    if _kind(scorer).itemsize < 4:
        bound = max(BOUND_16, 2 * torch.finfo(_kind(scorer)).eps * WIDE)
    worst = float("nan")
    for at_head in (False, True) if decoder_of(scorer.model) is not None else (True,):
        scorer.at_head = at_head
        try:
            with torch.no_grad():
                gaps = [scorer.head_gap(row, 1.0), scorer.head_gap(row, factor)]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AttributeError, TypeError):  # this kind of states does not exist
            continue
        if all(gap <= bound for gap in gaps):
            return
        worst = max(gaps) if worst != worst else worst
    raise ConfigurationError(
        f"the language-model head of {name} must be one that the scorer can compute: got "
        f"log-probabilities {worst:.2g} away from the model's. Please report the architecture."
    )


def _choose_padding(
    scorer: Verified,
    rows: list[Tensor],
    prompts: list[int],
    wanted: list[Tensor],
    spread: float,
    name: str,
) -> None:
    """Let rows of different lengths share a pass if that leaves their scores unchanged."""
    for pads in (False,) if picked_keys(scorer.model) else (True, False):
        scorer.pads = pads
        found = scorer.chosen(rows, prompts)
        if close(found, wanted, _kind(scorer), spread):
            break
    else:
        apart = largest_gap(found, wanted, _kind(scorer))
        raise ConfigurationError(
            f"the log-probabilities of {name} must not depend on other rows of a batch: got some "
            f"of {type(scorer.model).__name__} that are {apart:.2g} away from those of a single "
            "row. Please report the architecture."
        )
    if scorer.sharded and not scorer.pads:
        raise ConfigurationError(
            f"`strategy` must not shard {name}: got fsdp2, and {type(scorer.model).__name__} "
            "needs one pass for each row length, and lengths differ between ranks. Use ddp."
        )
