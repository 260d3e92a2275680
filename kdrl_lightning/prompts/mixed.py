"""A mixture of prompt sources in fixed proportions."""

from __future__ import annotations

from array import array

import numpy as np
from numpy.typing import NDArray

from kdrl_lightning.common.untyped import Row
from kdrl_lightning.errors import ConfigurationError, require_count
from kdrl_lightning.prompts.base import Prompts, PromptSource


class MixedPrompts(PromptSource):
    """Rows of several sources, mixed by weight; each row gets its source's name as ``source``.

    For every n, the first n rows have the proportions of the weights, to within one row per source.
    Each source's rows are shuffled with the seed; after its last row, they are shuffled again.

    Args:
        sources: prompt sources by name.
        weights: weight of each source, above 0; only ratios count; None: the sources' sizes.
        size: number of rows; None: the mixture ends before a row would be repeated.
        seed: seed of the shuffles.

    Raises:
        ConfigurationError: an empty source, or weights that do not fit the sources.
    """

    def __init__(
        self,
        sources: dict[str, Prompts],
        weights: dict[str, float] | None = None,
        size: int | None = None,
        seed: int = 0,
    ) -> None:
        if not sources or not all(len(source) for source in sources.values()):
            raise ConfigurationError(
                "`sources` must be sources with at least one row each: got "
                f"{ {name: len(source) for name, source in sources.items()} }. Remove empty ones."
            )
        weights = {n: float(len(s)) for n, s in sources.items()} if weights is None else weights
        if set(weights) != set(sources):
            raise ConfigurationError(
                f"`weights` must have the names of `sources`, {', '.join(sources)}: got "
                f"{', '.join(map(str, weights)) or 'none'}. Give each source one weight."
            )
        for name, weight in weights.items():
            if not 0.0 < weight < float("inf"):
                raise ConfigurationError(
                    f"`weights` must be above 0 and finite: got {weight} for {name}. "
                    "Remove a source that must not be used."
                )
        require_count("seed", seed, 0, float("inf"))
        if size is not None:
            require_count("size", size, 1, float("inf"))
        total = sum(weights.values())
        sizes = [len(source) for source in sources.values()]
        self.sources = sources
        self.names = list(sources)
        self._rows = _interleave([weights[n] / total for n in sources], sizes, size, seed)

    def __len__(self) -> int:
        return len(self._rows[0])

    def __getitem__(self, index: int) -> Row:
        which, row = (places[index] for places in self._rows)
        name = self.names[which]
        return {**self.sources[name][row], "source": name}

    def where(self, index: int) -> str:
        """Describe a row by its number in its source."""
        which, row = (places[index] for places in self._rows)
        return f"row {row} of its source {self.names[which]}"


def _interleave(
    shares: list[float], sizes: list[int], size: int | None, seed: int
) -> tuple[array[int], array[int]]:
    """Return the source's index and the row of each position; without a size, repeat no row.

    Of the sources with fewer rows than their share, we take the one whose next row is due first.
    """
    taken = [0] * len(shares)
    orders: dict[int, NDArray[np.int64]] = {}
    whiches, rows = array("i"), array("q")
    while size is None or len(rows) < size:
        due = [k for k, share in enumerate(shares) if share * (len(rows) + 1) > taken[k] + 1e-9]
        which = min(due, key=lambda k: (taken[k] + 1) / shares[k])
        turn, offset = divmod(taken[which], sizes[which])
        if turn and size is None:
            break
        if not offset:
            orders[which] = np.random.default_rng([seed, which, turn]).permutation(sizes[which])
        whiches.append(which)
        rows.append(int(orders[which][offset]))
        taken[which] += 1
    return whiches, rows
