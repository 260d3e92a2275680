"""Aligns a student's completions with a teacher's tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.teachers.cross_tokenizer.chunks import Ints, cut
from kdrl_lightning.teachers.cross_tokenizer.text_encoder import TextEncoder
from kdrl_lightning.teachers.cross_tokenizer.token_bytes import TokenBytes

# Texts that every teacher must be able to read.
PRINTABLE = re.compile(rb"[\t\n -~]+")
# The place of a token for which the teacher has no score.
NO_SCORE = -1


@dataclass(frozen=True)
class Chunked:
    """A completion of T student tokens in the teacher's U tokens.

    Attributes:
        teacher_ids: ``[U]``, the completion in the teacher's vocabulary, at least one token.
        teacher_places: ``[U]``, how many teacher tokens of its chunk stand before one.
        places: ``[T]``, how many tokens of its chunk stand before a token; ``NO_SCORE`` if the
            teacher cannot score it.
        columns: ``[T]``, place among the teacher's tokens of the first one of the token's chunk; 0
            without a score.
        differs_at: first byte that the teacher's tokens do not write; None if they write all.
    """

    teacher_ids: Ints
    teacher_places: Ints
    places: Ints
    columns: Ints
    differs_at: int | None


@dataclass
class _Row:
    """One completion on its way: text parts as bytes, special tokens as ids of the teacher."""

    parts: list[bytes | int]
    covered: int  # student tokens that the parts cover
    teacher_ids: list[int]
    differs_at: int | None = None


class Aligner:
    """Writes completions in the teacher's tokens, and cuts both into chunks of the same bytes.

    Chunks are minimal. A special token is a separate chunk, and so is the end token, which
    becomes the teacher's. The tokens after one that the teacher does not have (a special token, or
    a text that its tokenizer changes) have no score, because the teacher would read another text.

    Args:
        student: the student's vocabulary.
        teacher: the teacher's.
        ends: tokens that end a completion of the student.
        max_chunk_tokens: most tokens of a chunk, on either side; the teacher's scores of longer
            chunks are left out. None: no limit.

    Raises:
        ConfigurationError: the teacher's tokenizer changes a text of printable ASCII characters.
    """

    def __init__(
        self,
        student: TokenBytes,
        teacher: TokenBytes,
        ends: Sequence[int],
        max_chunk_tokens: int | None = None,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.ends = frozenset(ends)
        self.max_chunk_tokens = max_chunk_tokens
        self.encode = TextEncoder(teacher)
        self._refuse_changed_text()

    def __call__(
        self, completions: Sequence[Ints], ends: Sequence[int], most: Sequence[int] | None = None
    ) -> list[Chunked]:
        """Align completions.

        Args:
            completions: ids of each completion; one that was not cut ends with an end token.
            ends: the teacher's end token of each completion.
            most: most tokens of the teacher in each completion; later ones are left out.

        Returns:
            One alignment per completion.
        """
        if not completions:
            return []
        # 1. Cut each completion into texts and special tokens.
        rows = [self._parts(ids, end) for ids, end in zip(completions, ends, strict=True)]
        # 2. Encode all texts at once, and check that the tokens write the same bytes.
        texts = [part for row in rows for part in row.parts if isinstance(part, bytes)]
        encoded = iter(self.encode(texts))
        for row in rows:
            for part in row.parts:
                own = [part] if isinstance(part, int) else next(encoded)
                if row.differs_at is None:
                    self._append(row, part, own)
        for row, limit in zip(rows, most or (), strict=False):
            del row.teacher_ids[max(limit, 0) :]
        # 3. Find the common boundaries of all rows.
        return self._chunked(completions, rows, ends)

    def _parts(self, ids: Ints, end: int) -> _Row:
        ended = len(ids) > 0 and int(ids[-1]) in self.ends
        body = self.student.index(ids[: len(ids) - ended])
        parts: list[bytes | int] = []
        start = 0
        for stop in np.flatnonzero(~self.student.plain[body]).tolist():
            if stop > start:
                parts.append(self.student.text(body[start:stop].tolist()))
            name = self.student.special.get(int(body[stop]))
            twin = None if name is None else self.teacher.id_of_special.get(name)
            if twin is None:
                return _Row(parts, stop, [])
            parts.append(twin)
            start = stop + 1
        if len(body) > start:
            parts.append(self.student.text(body[start:].tolist()))
        return _Row([*parts, end] if ended else parts, len(ids), [])

    def _append(self, row: _Row, part: bytes | int, own: list[int]) -> None:
        """Add the teacher's tokens of a part to a row, up to the first byte that differs."""
        if isinstance(part, int):
            row.teacher_ids += own
            return
        pieces = self.teacher.pieces
        written: bytes | None
        try:
            written = b"".join(map(pieces.__getitem__, own))  # type: ignore[arg-type]
        except TypeError:  # an unknown token
            written = None
        if written == part:
            row.teacher_ids += own
            return
        known = next((n for n, i in enumerate(own) if i < 0 or pieces[i] is None), len(own))
        written = self.teacher.text(own[:known])
        pairs = zip(written, part, strict=False)
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(written), len(part)))
        row.differs_at = same + int(self.teacher.lengths[row.teacher_ids].sum())
        ends = np.cumsum(self.teacher.lengths[own[:known]])
        row.teacher_ids += own[: int((ends <= same).sum())]

    def _chunked(
        self, completions: Sequence[Ints], rows: list[_Row], ends: Sequence[int]
    ) -> list[Chunked]:
        theirs = np.concatenate([np.array(row.teacher_ids, np.int64) for row in rows])
        counts = np.array([row.covered for row in rows])
        their_counts = np.array([len(row.teacher_ids) for row in rows])
        covered = [ids[: row.covered] for ids, row in zip(completions, rows, strict=True)]
        lengths = self.student.lengths[self.student.index(np.concatenate(covered))]
        first, second = cut(lengths, counts, self.teacher.lengths[theirs], their_counts)
        kept = first.whole
        if self.max_chunk_tokens is not None:
            sizes = np.bincount(first.chunks[kept])
            their_sizes = np.bincount(second.chunks[second.whole])
            short = np.maximum(sizes, their_sizes) <= self.max_chunk_tokens
            kept = kept.copy()
            kept[kept] = short[first.chunks[kept]]
        places = np.where(kept, first.places, NO_SCORE)
        # The first teacher token of every chunk, in the order of the chunks.
        opens = np.flatnonzero(second.whole & (second.places == 0))
        columns = np.zeros_like(places)
        columns[kept] = opens[first.chunks[kept]]
        columns[kept] -= np.repeat(np.cumsum(their_counts) - their_counts, counts)[kept]
        out = []
        start = other = 0
        for ids, row, end in zip(completions, rows, ends, strict=True):
            stop, last = start + row.covered, other + len(row.teacher_ids)
            rest = len(ids) - row.covered
            empty = last == other  # a model scores at least one token
            out.append(
                Chunked(
                    np.array([end]) if empty else theirs[other:last],
                    np.array([0]) if empty else second.places[other:last],
                    _longer(places[start:stop], rest, NO_SCORE),
                    _longer(columns[start:stop], rest, 0),
                    row.differs_at,
                )
            )
            start, other = stop, last
        return out

    def _refuse_changed_text(self) -> None:
        """Encode every token of the student that is printable ASCII."""
        texts = [p for p in self.student.pieces if p and PRINTABLE.fullmatch(p)]
        for text, ids in zip(texts, self.encode(texts), strict=True):
            row = _Row([text], 0, [])
            self._append(row, text, ids)
            if row.differs_at is not None:
                known = [i for i in ids if i >= 0 and self.teacher.pieces[i] is not None]
                raise ConfigurationError(
                    f"the teacher's tokenizer must write what the student writes: got "
                    f"{self.teacher.text(known)!r} of {self.teacher.name} for {text!r} of "
                    f"{self.student.name}, first different at byte {row.differs_at}. Choose a "
                    "teacher whose tokenizer neither changes text nor lacks characters."
                )


def _longer(values: Ints, by: int, filler: int) -> Ints:
    return np.concatenate([values, np.full(by, filler)]) if by else values
