"""Row lengths at which an architecture changes what it computes."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from kdrl_lightning.common.untyped import HFConfig, HFModel
from kdrl_lightning.models.architectures.rotary import switch_lengths

# Settings that hold a length: windows and chunks of attention, number of keys of sparse attention.
NAMES = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "attention_chunk_size",
    "local_attention",
    "window_size",
    "index_topk",
    "indexer_budget",
    "keep_window_size",
    "chunk_size",
    "mamba_chunk_size",
)
LONGEST = 4096
MARGIN = 6
OPERATIONS = 2e10  # floating-point operations of a row on a CPU: about a second


def probe_length(model: HFModel, rotary: bool = True) -> int:
    """Return the length of a check's longest row: just past every switch that we can afford.

    A switch is a row length at which the model changes what it computes. We skip those beyond
    ``LONGEST`` tokens, beyond the model's positions, or too slow on this device: the row would cost
    more than the run's first update.

    Args:
        model: the model to check.
        rotary: also go past the switches that sampling refuses to cross; else stay below them.

    Returns:
        The length in tokens.
    """
    config = model.config.get_text_config(decoder=True)
    named = [getattr(config, name, None) for name in NAMES]
    switches = [length for length in named if isinstance(length, int)]
    beyond = [length for length, _ in switch_lengths(model)]
    most = min([LONGEST, *(n - 3 * MARGIN for n in [*beyond, *picked_keys(model)] if not rotary)])
    switches += beyond if rotary else []
    if model.device.type == "cpu":
        size = sum(p.numel() for p in model.parameters())
        most = min(most, int(OPERATIONS / (2 * size)))
    positions = getattr(config, "max_position_embeddings", None) or most
    most = min(most, positions - MARGIN)
    return max([0, *(length for length in switches if 0 < length <= most)]) + MARGIN


@dataclass(frozen=True)
class Change:
    """A length of a row beyond which a model computes all of its tokens differently.

    Attributes:
        limit: the length, in tokens.
        always: the model changes again with every further token.
        what: the part of the model that changes.
    """

    limit: int
    always: bool
    what: str

    def crossing(self, max_tokens: int) -> range:
        """Return the prompt lengths from which a completion may grow past the change.

        >>> Change(4096, False, "rotary embedding").crossing(512)
        range(3585, 4097)
        """
        last = sys.maxsize - 1 if self.always else self.limit
        return range(max(1, self.limit - max_tokens + 1), last + 1)


def changes(model: HFModel) -> list[Change]:
    """Return the lengths at which a model changes what it computes for earlier tokens."""
    rotary = [Change(n, always, "rotary embedding") for n, always in switch_lengths(model)]
    return rotary + [Change(n, True, "choice of keys") for n in picked_keys(model)]


def may_change(config: HFConfig) -> bool:
    """Return whether a model with this configuration may have ``changes``.

    Only ``changes``, which reads the model's modules, is certain.
    """
    rotary = str(getattr(config.get_text_config(decoder=True), "rope_parameters", None))
    return "longrope" in rotary or "dynamic" in rotary or bool(_picked_keys(config))


def picked_keys(model: HFModel) -> list[int]:
    """Return how many keys sparse attention picks with an indexer; empty without an indexer.

    Many keys have equal scores of 0, and their number decides which of them it picks. So in rows
    longer than this, a token's log-probability changes with the number of tokens after it.
    """
    return _picked_keys(model.config)


def _picked_keys(config: HFConfig) -> list[int]:
    config = config.get_text_config(decoder=True)
    indexed = "indexed_attention" in (getattr(config, "layer_types", None) or ())
    count = getattr(config, "index_topk", None)
    return [count] if indexed and isinstance(count, int) else []
