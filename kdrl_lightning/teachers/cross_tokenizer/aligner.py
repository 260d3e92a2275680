"""Aligns a student's completions with a teacher's tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.teachers.cross_tokenizer.chunks import Ints
from kdrl_lightning.teachers.cross_tokenizer.parts import NO_SCORE, Parts, align_parts, read
from kdrl_lightning.teachers.cross_tokenizer.segments import Cutter, Segments
from kdrl_lightning.teachers.cross_tokenizer.text_encoder import TextEncoder
from kdrl_lightning.teachers.cross_tokenizer.token_bytes import TokenBytes
from kdrl_lightning.teachers.cross_tokenizer.words import writes_words_alone

# Texts that every teacher must be able to read.
PRINTABLE = re.compile(rb"[\t\n -~]+")


@dataclass(frozen=True)
class Chunked:
    """A completion of T student tokens in the teacher's U tokens.

    Attributes:
        teacher_ids: ``[U]``, the completion in the teacher's vocabulary, at least one token.
        teacher_places: ``[U]``, how many teacher tokens of its chunk precede a token.
        places: ``[T]``, how many tokens of its chunk precede a token; ``NO_SCORE`` if the
            teacher cannot score it.
        columns: ``[T]``, index in ``teacher_ids`` of the first token of the token's chunk; 0
            without a score.
        differs_at: first byte that the teacher's tokens do not write; None if they write all.
    """

    teacher_ids: Ints
    teacher_places: Ints
    places: Ints
    columns: Ints
    differs_at: int | None


class Aligner:
    """Writes completions in the teacher's tokens, and cuts both into chunks of the same bytes.

    Chunks are minimal. A special token is a separate chunk, and so is the end token, which
    becomes the teacher's. If the teacher lacks a special token or its tokenizer changes a text,
    later tokens have no score, because the teacher would read another text.

    Args:
        student: the student's vocabulary.
        teacher: the teacher's.
        ends: tokens that end a completion of the student.
        max_chunk_tokens: longest chunk, in tokens of either side; the teacher's scores of longer
            chunks are left out. None: no limit.
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
        self.segments = Cutter(student, writes_words_alone(teacher, self.encode))

    def __call__(
        self, completions: Sequence[Ints], ends: Sequence[int], most: Sequence[int] | None = None
    ) -> list[Chunked]:
        """Align completions.

        Args:
            completions: ids of each completion; one that was not truncated ends with an end token.
            ends: the teacher's end token of each completion.
            most: maximum number of teacher tokens of each completion; later ones are left out.

        Returns:
            One alignment per completion.
        """
        if not completions:
            return []
        # 1. Cut each completion, without its end token, into segments.
        ended = [len(ids) > 0 and int(ids[-1]) in self.ends for ids in completions]
        bodies = [ids[: len(ids) - end] for ids, end in zip(completions, ended, strict=True)]
        counts = np.fromiter(map(len, bodies), np.int64, len(bodies))
        ids = self.student.index(np.concatenate(bodies))
        segments = self.segments(ids, counts)
        # 2. Encode and align each distinct segment once.
        parts = align_parts(
            [ids[segments.starts[n] :][: segments.sizes[n]] for n in segments.examples],
            self.student,
            self.teacher,
            self.encode,
            self.max_chunk_tokens,
        )
        # 3. Copy them to all their occurrences, and add the end tokens.
        rows, whole = _placed(parts, segments, counts, np.cumsum(self.student.lengths[ids]))
        limits: Sequence[int | None] = most or [None] * len(rows)
        return [
            _closed(row, end if closes else None, end, read_whole, limit)
            for row, end, closes, read_whole, limit in zip(
                rows, ends, ended, whole, limits, strict=True
            )
        ]

    def refuse_changed_text(self) -> None:
        """Check that the teacher's tokenizer keeps every printable ASCII token of the student.

        Raises:
            ConfigurationError: it changes one of them.
        """
        texts = [p for p in self.student.pieces if p and PRINTABLE.fullmatch(p)]
        for text, ids in zip(texts, self.encode(texts), strict=True):
            _, differs_at = read(self.teacher, text, ids)
            if differs_at is not None:
                known = [i for i in ids if i >= 0 and self.teacher.pieces[i] is not None]
                raise ConfigurationError(
                    f"the teacher's tokenizer must write what the student writes: got "
                    f"{self.teacher.text(known)!r} of {self.teacher.name} for {text!r} of "
                    f"{self.student.name}, first different at byte {differs_at}. Choose a "
                    "teacher whose tokenizer neither changes text nor lacks characters."
                )


def _placed(
    parts: Parts, segments: Segments, counts: Ints, ends: Ints
) -> tuple[list[Chunked], list[bool]]:
    """Build the rows from aligned segments; return them, and which the teacher reads whole.

    Args:
        parts: the distinct segments, aligned.
        segments: where they are in the rows.
        counts: ``[B]``, tokens of each row.
        ends: ``[T]``, the byte at which each token ends, over all rows.
    """
    which, starts, sizes = segments.which, segments.starts, segments.sizes
    row = np.searchsorted(np.cumsum(counts), starts, "right")
    # 1. Leave out what follows a segment that the teacher cannot write.
    bad = np.isin(which, list(parts.differs_at))
    before = np.append(0, np.cumsum(bad))
    firsts = np.searchsorted(row, np.arange(len(counts)))  # a row's first segment
    known = before[:-1] == before[firsts][row]
    their_sizes = np.where(known, parts.their_sizes[which], 0)
    # 2. Copy the tokens of both sides.
    ours, theirs = (
        _spread(parts.starts[which], sizes),
        _spread(parts.their_starts[which], their_sizes),
    )
    scored = np.repeat(known, sizes) & (parts.places[ours] != NO_SCORE)
    places = np.where(scored, parts.places[ours], NO_SCORE)
    their_ends = np.append(0, np.cumsum(their_sizes))
    offsets = their_ends[:-1] - their_ends[firsts][row]
    columns = np.where(scored, parts.columns[ours] + np.repeat(offsets, sizes), 0)
    # 3. Cut them into rows.
    stops, their_stops = np.cumsum(counts)[:-1], their_ends[firsts][1:]
    tables = (
        np.split(parts.teacher_ids[theirs], their_stops),
        np.split(parts.teacher_places[theirs], their_stops),
        np.split(places, stops),
        np.split(columns, stops),
    )
    base = np.append(0, ends)
    differs_at = {
        int(row[n]): at + int(base[starts[n]] - base[starts[firsts[row[n]]]])
        for n in np.flatnonzero(bad & known).tolist()
        if (at := parts.differs_at[int(which[n])]) is not None
    }
    rows = [
        Chunked(*values, differs_at.get(n)) for n, values in enumerate(zip(*tables, strict=True))
    ]
    return rows, (np.bincount(row, bad, len(counts)) == 0).tolist()


def _closed(
    row: Chunked, closing: int | None, end: int, read_whole: bool, limit: int | None
) -> Chunked:
    """Return a row with its end token, truncated to the teacher's context.

    Args:
        row: without the end token.
        closing: the teacher's end token; None if the completion was truncated.
        end: a token for the teacher to read if the row is empty.
        read_whole: the teacher reads everything before the end token.
        limit: maximum number of teacher tokens; None: no limit.
    """
    ids, their_places, places, columns, differs_at = (getattr(row, f.name) for f in fields(row))
    if closing is not None:
        places = np.append(places, 0 if read_whole else NO_SCORE)
        columns = np.append(columns, len(ids) if read_whole else 0)
        if read_whole:
            ids, their_places = np.append(ids, closing), np.append(their_places, 0)
    if limit is not None and len(ids) > limit:
        opens = np.flatnonzero(their_places == 0)
        stops = np.append(opens[1:], len(ids))[np.searchsorted(opens, columns)]
        scored = (places != NO_SCORE) & (stops <= limit)
        places, columns = np.where(scored, places, NO_SCORE), np.where(scored, columns, 0)
        ids, their_places = ids[: max(limit, 0)], their_places[: max(limit, 0)]
    if not len(ids):  # a model scores at least one token
        ids, their_places = np.array([end]), np.array([0])
    return Chunked(ids, their_places, places, columns, differs_at)


def _spread(starts: Ints, sizes: Ints) -> Ints:
    """Return the indices of all tokens of segments: ``sizes`` indices from each of ``starts`` on.

    >>> _spread(np.array([5, 0]), np.array([2, 1])).tolist()
    [5, 6, 0]
    """
    ends = np.cumsum(sizes)
    out: Ints = np.arange(int(sizes.sum())) + np.repeat(starts - (ends - sizes), sizes)
    return out
