"""Compares a scorer with the model's own logits, and chooses how its rows are run.

Every architecture is tried on rows of different lengths, past the lengths at which its
configuration says that something changes; see ``switches`` for those that are too long to try.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.architectures.attention import keep_soft_caps
from kdrl_lightning.models.architectures.hidden_states import decoder_of
from kdrl_lightning.models.architectures.switches import picked_keys, probe_length

BOUND = 1e-3  # of log-probabilities in 32 bits and more
BOUND_16 = 0.1  # of their mean in 16 bits: single tokens differ by more, as experts change
WIDE = 50.0  # logits are stretched to this, so that a soft-cap shows in any model


class Verified(Protocol):
    """What is asked of a scorer."""

    model: Any
    vocab_size: int | None
    sharded: bool
    shares: bool
    pads: bool
    at_head: bool

    def head(self) -> Any:
        """Return the language-model head."""

    def alone(self, ids: Tensor) -> Tensor:
        """Return the model's own logits ``[S, V]`` of one row."""

    def head_gap(self, ids: Tensor, factor: float) -> float:
        """Return how far the head is from the model's own, on states times ``factor``."""

    def chosen(self, rows: list[Tensor], prompts: list[int]) -> list[Tensor]:
        """Return the log-probabilities of the rows' completions, scored in one call."""

    def _shares(self, found: list[Tensor], wanted: list[Tensor]) -> bool:
        """Whether log-probabilities with shared prompts are those of rows alone."""


def verify(scorer: Verified, name: str) -> None:
    """Choose attention, padding and sharing so that scores are those of rows alone.

    Raises:
        ConfigurationError: none of them is right, or the model sees later tokens.
    """
    rows, prompts = probe_rows(scorer)
    try:
        own = _own(scorer, rows)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigurationError(
            f"the language model {name} must run on rows of token ids alone: got {reason} from "
            f"{type(scorer.model).__name__}. Use another model, or another `dtype`."
        ) from error
    if _ignores_features(scorer, rows[0], own[0]):
        own = _own(scorer, rows)
    _check_causal(scorer, own, prompts[0], name)
    _check_head(scorer, rows[-1], own[-1], name)
    wanted = [
        logits[p - 1 : -1].log_softmax(-1).gather(-1, row[p:, None]).squeeze(-1)
        for logits, row, p in zip(own, rows, prompts, strict=True)
    ]
    _choose_padding(scorer, rows, prompts, wanted, name)
    # Ranks may differ in what they share, which the collectives of a sharded model would not
    # survive; and float64 is for comparisons to 1e-10, in which norms that compute in float32
    # would tell apart where gradients are added up.
    if scorer.pads and not (scorer.sharded or scorer.at_head) and _kind(scorer) != torch.float64:
        scorer.shares = True
        try:
            scorer.shares = scorer._shares(scorer.chosen(rows, prompts), wanted)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a cache that it does not take shows in as many ways as there are models
            scorer.shares = False


def probe_rows(scorer: Verified) -> tuple[list[Tensor], list[int]]:
    """Return rows of ids and their prompts' lengths.

    The first two are equal but for their last tokens, the third shares their prompt.
    """
    device, size = scorer.head().weight.device, scorer.head().weight.shape[0]
    ids = torch.arange(probe_length(scorer.model) + 16, device=device) * 7 + 3
    ids %= min(size, scorer.vocab_size or size)
    long = ids[: max(11, probe_length(scorer.model)) + 6]
    other = torch.cat([long[:-4], long[-4:].flip(0)])
    prompt = len(long) - 6
    return [long, other, long[:-3].clone(), ids[5:12]], [prompt, prompt, prompt, 5]


def _own(scorer: Verified, rows: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [scorer.alone(row) for row in rows]


def close(ours: list[Tensor], theirs: list[Tensor], kind: torch.dtype) -> bool:
    """Return whether log-probabilities of rows agree as far as weights of a type allow."""
    return largest_gap(ours, theirs, kind) <= (BOUND if kind.itemsize >= 4 else BOUND_16)


def largest_gap(ours: list[Tensor], theirs: list[Tensor], kind: torch.dtype) -> float:
    """Return the largest difference; in 16 bits the largest mean over a row. NaN if one is."""
    gaps = [(a - b).abs() for a, b in zip(ours, theirs, strict=True)]
    return float(torch.stack([g.max() if kind.itemsize >= 4 else g.mean() for g in gaps]).max())


def _kind(scorer: Verified) -> torch.dtype:
    kind: torch.dtype = scorer.head().weight.dtype
    return kind


def _ignores_features(scorer: Verified, row: Tensor, own: Tensor) -> bool:
    """Go over to eager attention if the model's fast one leaves something out of it."""
    model = scorer.model
    if keep_soft_caps(model):
        return True
    fast = model.config.get_text_config(decoder=True)._attn_implementation
    if fast != "sdpa":
        return False
    try:
        model.set_attn_implementation("eager")
        eager = _own(scorer, [row])[0]
    except Exception:  # some architectures have no eager attention
        model.set_attn_implementation(fast)
        return False
    if close([eager.log_softmax(-1)], [own.log_softmax(-1)], _kind(scorer)):
        model.set_attn_implementation(fast)
        return False
    return True


def _check_causal(scorer: Verified, own: list[Tensor], prompt: int, name: str) -> None:
    """The first two rows are equal up to two tokens behind their prompt."""
    first, second = (logits[: prompt + 2].log_softmax(-1) for logits in own[:2])
    if not first.isfinite().all() or close([first], [second], _kind(scorer)):
        return  # what is not finite is the head check's to say
    raise ConfigurationError(
        f"the language model {name} must not see later tokens: got log-probabilities of "
        f"{type(scorer.model).__name__} that change with the tokens after them. Use a causal "
        "model (an encoder of the BERT family needs `is_decoder: true` in its configuration)."
    )


def _check_head(scorer: Verified, row: Tensor, own: Tensor, name: str) -> None:
    """Try the decoder's states, then those that the head is called with."""
    largest = float(own.abs().max())
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
        except (RuntimeError, AttributeError, TypeError):  # states that are none, or elsewhere
            continue
        if all(gap <= bound for gap in gaps):
            return
        worst = max(gaps) if worst != worst else worst
    raise ConfigurationError(
        f"the language-model head of {name} must be one that is known here: got "
        f"log-probabilities {worst:.2g} away from the model's own. "
        "Please report the architecture."
    )


def _choose_padding(
    scorer: Verified, rows: list[Tensor], prompts: list[int], wanted: list[Tensor], name: str
) -> None:
    """Let rows of different lengths share a pass if that changes nothing."""
    for pads in (False,) if picked_keys(scorer.model) else (True, False):
        scorer.pads = pads
        found = scorer.chosen(rows, prompts)
        if close(found, wanted, _kind(scorer)):
            break
    else:
        apart = largest_gap(found, wanted, _kind(scorer))
        raise ConfigurationError(
            f"the log-probabilities of {name} must not depend on other rows: got some of "
            f"{type(scorer.model).__name__} that are {apart:.2g} away from those of a row alone. "
            "Please report the architecture."
        )
    if scorer.sharded and not scorer.pads:
        raise ConfigurationError(
            f"`strategy` must not shard {name}: got fsdp2, and {type(scorer.model).__name__} "
            "needs a pass for each length of row, which differ between ranks. Use ddp."
        )
