"""Encodes and aligns parts of completions one by one: texts and special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from kdrl_lightning.teachers.cross_tokenizer.chunks import Ints, cut
from kdrl_lightning.teachers.cross_tokenizer.text_encoder import TextEncoder
from kdrl_lightning.teachers.cross_tokenizer.token_bytes import TokenBytes

# In `places`: the teacher has no score for the token.
NO_SCORE = -1


class Parts(NamedTuple):
    """D aligned parts, flat over their tokens: N of the student, M of the teacher.

    Attributes:
        starts: ``[D]``, index of a part's first student token.
        their_starts: ``[D]``, index of its first teacher token.
        their_sizes: ``[D]``, number of its teacher tokens.
        teacher_ids: ``[M]`` token ids.
        teacher_places: ``[M]``, how many teacher tokens of its chunk precede a token.
        places: ``[N]``, how many student tokens of its chunk precede a token, or ``NO_SCORE``.
        columns: ``[N]``, the chunk's first teacher token, counted from the part's start.
        differs_at: the parts that the teacher cannot write whole, with the first byte that differs;
            None for a special token that it does not have.
    """

    starts: Ints
    their_starts: Ints
    their_sizes: Ints
    teacher_ids: Ints
    teacher_places: Ints
    places: Ints
    columns: Ints
    differs_at: dict[int, int | None]


def align_parts(
    parts: Sequence[Ints],
    student: TokenBytes,
    teacher: TokenBytes,
    encode: TextEncoder,
    max_chunk_tokens: int | None,
) -> Parts:
    """Write parts in the teacher's tokens, and cut both sides into minimal chunks.

    Args:
        parts: D lists of indices into ``student.pieces``, either of plain tokens or of one special
            token.
        student: the student's vocabulary.
        teacher: the teacher's.
        encode: the teacher's tokenizer.
        max_chunk_tokens: longest chunk that has a score; None: no limit.
    """
    # 1. Encode the texts, and translate the special tokens.
    texts = {
        n: student.text(part.tolist()) for n, part in enumerate(parts) if student.plain[part[0]]
    }
    encoded = dict(zip(texts, encode(list(texts.values())), strict=True))
    written: list[list[int]] = []
    differs_at: dict[int, int | None] = {}
    for n, part in enumerate(parts):
        if n in texts:
            ids, at = read(teacher, texts[n], encoded[n])
            if at is not None:
                differs_at[n] = at
        else:
            twin = teacher.id_of_special.get(student.special.get(int(part[0]), ""))
            ids = [] if twin is None else [twin]
            if twin is None:
                differs_at[n] = None
        written.append(ids)
    # 2. Find the common boundaries.
    sizes, their_sizes = (np.fromiter(map(len, x), np.int64, len(x)) for x in (parts, written))
    ours = np.concatenate([*parts, np.zeros(0, np.int64)])
    theirs = np.fromiter(chain.from_iterable(written), np.int64, int(their_sizes.sum()))
    first, second = cut(student.lengths[ours], sizes, teacher.lengths[theirs], their_sizes)
    kept = first.whole.copy()
    if max_chunk_tokens is not None:
        ours_in, theirs_in = (np.bincount(side.chunks[side.whole]) for side in (first, second))
        short = np.maximum(ours_in, theirs_in) <= max_chunk_tokens
        kept[kept] = short[first.chunks[kept]]
    # 3. Find where each token's chunk is on the other side.
    starts, their_starts = np.cumsum(sizes) - sizes, np.cumsum(their_sizes) - their_sizes
    opens = np.flatnonzero(second.whole & (second.places == 0))  # in the order of the chunks
    columns = np.zeros_like(ours)
    columns[kept] = opens[first.chunks[kept]] - np.repeat(their_starts, sizes)[kept]
    places = np.where(kept, first.places, NO_SCORE)
    return Parts(
        starts, their_starts, their_sizes, theirs, second.places, places, columns, differs_at
    )


def read(teacher: TokenBytes, text: bytes, ids: list[int]) -> tuple[list[int], int | None]:
    """Return the tokens that write a text, up to the first byte that differs.

    Args:
        teacher: the vocabulary.
        text: what the tokens should write.
        ids: the tokens; negative or unknown ones write nothing.

    Returns:
        The tokens, and the index of that byte; None if they write the whole text.
    """
    pieces = teacher.pieces
    known = next((n for n, i in enumerate(ids) if i < 0 or pieces[i] is None), len(ids))
    written = teacher.text(ids[:known])
    if known == len(ids) and written == text:
        return ids, None
    pairs = zip(written, text, strict=False)
    same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(written), len(text)))
    ends = np.cumsum(teacher.lengths[ids[:known]])
    return ids[: int((ends <= same).sum())], same
