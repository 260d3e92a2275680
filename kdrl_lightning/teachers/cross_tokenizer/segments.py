"""Cuts completions into segments, so that each distinct one is encoded only once.

A rollout repeats its words. If the teacher writes a word the same way whatever its neighbours are,
we encode and align each distinct word once, and let NumPy copy the result to all its occurrences.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdrl_lightning.teachers.cross_tokenizer.chunks import Bools, Ints
from kdrl_lightning.teachers.cross_tokenizer.token_bytes import TokenBytes

# Printable ASCII characters without the space.
PRINTABLE = range(ord("!"), ord("~") + 1)


class Segments(NamedTuple):
    """N segments of all completions, D of them distinct.

    Attributes:
        starts: ``[N]``, index of a segment's first token among the tokens of all completions.
        sizes: ``[N]``, tokens of each segment.
        which: ``[N]``, the index of each segment among the distinct ones.
        examples: ``[D]``, for each distinct segment the index of one that equals it.
    """

    starts: Ints
    sizes: Ints
    which: Ints
    examples: Ints


class Cutter:
    """Finds the segments of completions.

    A special token is a segment, and so is the text between two of them. With ``words``, a text is
    also cut before a single space between two printable ASCII characters.

    Args:
        student: the vocabulary of the completions.
        words: also cut texts into words, see above; the teacher's tokenizer must write the same
            tokens with and without such a cut.
    """

    def __init__(self, student: TokenBytes, words: bool) -> None:
        self.words = words
        pieces = [piece or b"" for piece in student.pieces]
        self._special = ~student.plain
        self._space = _codes(pieces, 0, 1) == ord(" ")
        self._lone = np.array([piece == b" " for piece in pieces])
        self._begins, self._goes_on, self._ends = (
            _printable(_codes(pieces, start, stop)) for start, stop in ((0, 1), (1, 2), (-1, None))
        )
        draws = np.random.default_rng(0).integers(2**63, size=len(pieces), dtype=np.uint64)
        self._marks = draws * np.uint64(2) + np.uint64(
            1
        )  # odd, so that no bit of a product is lost

    def __call__(self, ids: Ints, counts: Ints) -> Segments:
        """Cut completions into segments, and find those that are equal.

        Args:
            ids: ``[T]``, all tokens as indices into the vocabulary, row after row.
            counts: ``[B]``, tokens of each row.
        """
        special = self._special[ids]
        opens = special.copy()
        opens[1:] |= special[:-1]
        if self.words:
            after = np.append(ids[1:], len(self._lone) - 1)
            text = np.where(self._lone[ids], self._begins[after], self._goes_on[ids])
            opens[1:] |= (self._space[ids] & text)[1:] & self._ends[ids[:-1]]
        opens[(np.cumsum(counts) - counts)[counts > 0]] = True
        starts = np.flatnonzero(opens)
        sizes = np.diff(np.append(starts, len(ids)))
        return Segments(starts, sizes, *self._different(ids, starts, sizes))

    def _different(self, ids: Ints, starts: Ints, sizes: Ints) -> tuple[Ints, Ints]:
        """Return each segment's index among the distinct ones, and an example of each of these."""
        if not len(starts):
            return starts, starts
        place = np.arange(len(ids)) - np.repeat(starts, sizes)
        factors = np.cumprod(np.full(sizes.max(), self._marks[0]), dtype=np.uint64)
        sums = np.add.reduceat(self._marks[ids] * factors[place], starts)
        _, examples, which = np.unique(sums, return_index=True, return_inverse=True)
        same = sizes[examples[which]] == sizes
        if same.all():
            same = ids[np.repeat(starts[examples[which]], sizes) + place] == ids
        if not same.all():  # two segments have the same sum: count all segments as distinct
            which = examples = np.arange(len(starts))
        return which, examples


def _codes(pieces: list[bytes], start: int, stop: int | None) -> NDArray[np.uint8]:
    """Return a byte of each piece; 0 if it is not that long."""
    return np.array([(piece[start:stop] or b"\0")[0] for piece in pieces], np.uint8)


def _printable(codes: NDArray[np.uint8]) -> Bools:
    return (codes >= PRINTABLE.start) & (codes < PRINTABLE.stop)
