"""Draw the prompts of a rollout; a row that cannot be used is replaced, counted and reported."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TypeVar

from kdrl_lightning.common.untyped import State
from kdrl_lightning.errors import BadRow, TrainingStopped

T = TypeVar("T")

# Stop if more than this share of the prompts drawn in the last rollouts could not be used.
MAX_BAD_FRAC, LAST_ROLLOUTS = 0.1, 10
# MOST_TRIES unusable rows in one slot stop the run; it warns of the first NAMED rows, then counts.
MOST_TRIES, NAMED = 100, 5


def draw(prompts: Sequence[T], rows: Iterable[int]) -> tuple[T, list[BadRow]]:
    """Return the first usable prompt, and the errors of the rows before it.

    Args:
        prompts: all prompts; reading one that cannot be used raises ``BadRow``.
        rows: rows to try, in this order.

    Raises:
        TrainingStopped: none of the rows can be used.
    """
    skipped: list[BadRow] = []
    for row in rows:
        try:
            return prompts[row], skipped
        except BadRow as error:
            skipped.append(error)
    raise TrainingStopped(
        f"{len(skipped)} prompts in a row cannot be used. Correct these rows. The last error: "
        f"{skipped[-1]}"
    )


class DrawCounts:
    """Counts the prompts that a rank draws, and stops the run if too many cannot be used."""

    def __init__(self) -> None:
        self._drawn, self._skipped, self._bad = 0, 0, 0
        self._named = 0
        self._last: deque[tuple[float, float]] = deque(maxlen=LAST_ROLLOUTS)
        self._reason = ""

    def add(self, prompts: int, skipped: Sequence[BadRow]) -> None:
        """Count prompts and skipped rows; warn of the first rows that nobody asked to drop."""
        bad = [error for error in skipped if not error.wished]
        self._drawn += prompts + len(skipped)
        self._skipped += len(skipped)
        self._bad += len(bad)
        for error in bad:
            self._reason = str(error)
            if self._named < NAMED:
                self._named += 1
                more = " Further rows are only counted." if self._named == NAMED else ""
                warnings.warn(f"skipped {error}{more}", stacklevel=2)

    def take(self) -> list[float]:
        """Return prompts drawn, rows skipped, and bad rows, counted since the last call."""
        values = [float(self._drawn), float(self._skipped), float(self._bad)]
        self._drawn = self._skipped = self._bad = 0
        return values

    def judge(self, drawn: float, bad: float) -> None:
        """Stop the run if too many rows were bad in the last rollouts.

        Args:
            drawn: prompts drawn in this rollout, summed over all ranks.
            bad: bad rows among them, summed over all ranks.

        Raises:
            TrainingStopped: more than a tenth of their prompts, and more than one, were bad.
        """
        self._last.append((drawn, bad))
        drawn, bad = (sum(values) for values in zip(*self._last, strict=True))
        if bad > max(1.0, MAX_BAD_FRAC * drawn):
            last = f" The last error on this rank: {self._reason}" if self._reason else ""
            raise TrainingStopped(
                f"{bad:.0f} of the {drawn:.0f} prompts drawn in the last {len(self._last)} "
                f"rollouts cannot be used, above {MAX_BAD_FRAC:.0%}. Correct these rows.{last}"
            )

    def state_dict(self) -> State:
        """Return the counts of the last rollouts."""
        return {"last": [list(pair) for pair in self._last], "named": self._named}

    def load_state_dict(self, state: State) -> None:
        """Restore the counts."""
        self._last = deque(((d, b) for d, b in state["last"]), maxlen=LAST_ROLLOUTS)
        self._named = state["named"]
