"""Known GPUs with their memory and speed, and a parser for amounts of memory such as 80GB."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from kdrl_lightning.errors import ConfigurationError

UNITS = {"MB": 1e6, "GB": 1e9, "TB": 1e12, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}
AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class Card:
    """Memory and peak speed of a GPU, from its data sheet.

    Attributes:
        name: name for ``--card``.
        memory: bytes, as the driver reports them.
        flops: dense bfloat16 operations per second, with float32 accumulation.
        bandwidth: memory bandwidth in bytes per second.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float


# From NVIDIA's data sheets; memory as the driver reports it.
CARDS = (
    Card("A100-80GB", 79.2 * 2**30, 312e12, 2.04e12),
    Card("H100", 79.1 * 2**30, 989e12, 3.35e12),
    Card("H200", 139.8 * 2**30, 989e12, 4.8e12),
    Card("L40S", 44.4 * 2**30, 362e12, 0.864e12),
    Card("RTX-4090", 23.5 * 2**30, 165e12, 1.01e12),
)


def card_named(name: str) -> Card:
    """Return a known GPU by its name; case, spaces and hyphens do not matter.

    Raises:
        ConfigurationError: the name is unknown.

    >>> card_named("rtx 4090").name, card_named("A100 80GB").name
    ('RTX-4090', 'A100-80GB')
    """
    plain = {_plain(card.name): card for card in CARDS} | {"a100": CARDS[0], "4090": CARDS[-1]}
    found = plain.get(_plain(name))
    if found is None:
        close = get_close_matches(_plain(name), plain, n=1)
        cure = f"Did you mean {plain[close[0]].name}?" if close else "Give `--gpu-memory` instead."
        names = ", ".join(card.name for card in CARDS)
        raise ConfigurationError(f"`--card` must be one of {names}: got {name}. {cure}")
    return found


def bytes_of(text: str) -> float:
    """Return an amount of memory in bytes.

    Raises:
        ConfigurationError: the number or a known unit is missing.

    >>> bytes_of("80GB"), bytes_of("1.5 gib")
    (80000000000.0, 1610612736.0)
    """
    units = {unit.lower(): size for unit, size in UNITS.items()}
    found = AMOUNT.fullmatch(text)
    size = units.get(found[2].lower()) if found else None
    amount = 0.0 if found is None or size is None else float(found[1]) * size
    if amount <= 0:
        raise ConfigurationError(
            f"`--gpu-memory` must be a number above 0 with one of the units {', '.join(UNITS)}: "
            f"got {text}. Write for example 80GB."
        )
    return amount


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
