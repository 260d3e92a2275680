"""Tests whether a tokenizer writes each word the same way, whatever its neighbours are."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from kdrl_lightning.teachers.cross_tokenizer.text_encoder import TextEncoder
from kdrl_lightning.teachers.cross_tokenizer.token_bytes import TokenBytes

# Where a text is cut: before a single space between two printable ASCII characters.
BOUNDARY = re.compile(rb"(?<=[!-~])(?= [!-~])")
# A token that crosses such a place.
ACROSS = re.compile(rb"[!-~] ")
# What the trial texts are made of; pre-tokenizers of real models treat each of these differently.
PARTS = [
    *("a", "I", "The", "answer", "isn't", "we'll", "'s", "'S", "D'OH", "A1b2", "HTTP/2", "_x"),
    *("12", "345", "3.14", "1,000", "-7}", "#1", "x=y", "(b)", '{"k":', "f(x);", "--", "..."),
    *("Größe", "nai\u0308ve", "数学の問題,", "Ответ", "مرحبا", "שלום!", "🙂", "👍🏽ok", "▁", "Ġ"),
    *("'", '"', "<", ">", ".", "!", "\n", " \n\n", "\t", "\r\n", "  ", "\u00a0", "\u3000"),
]
TEXTS, WORDS = 150, 24


def writes_words_alone(tokens: TokenBytes, encode: TextEncoder) -> bool:
    """Return whether the tokens of a text are those of its words, cut at ``BOUNDARY``.

    No token may cross a cut. The rest depends on the tokenizer's pre-tokenizer and normaliser, for
    which there is no general rule, so we try random texts. If a rare text is written otherwise, its
    chunks still have the same bytes on both sides.

    Args:
        tokens: the vocabulary.
        encode: its tokenizer.
    """
    if any(piece and ACROSS.search(piece) for piece in tokens.pieces):
        return False
    added = [token["content"] for token in tokens.spec["added_tokens"]]
    texts = list(_texts([*PARTS, *added[:64]]))
    words = [BOUNDARY.split(text) for text in texts]
    alone = iter(encode([word for row in words for word in row]))
    together = encode(texts)
    return all(
        [i for _ in row for i in next(alone)] == ids
        for row, ids in zip(words, together, strict=True)
    )


def _texts(parts: Sequence[str]) -> list[bytes]:
    """Return random texts of parts, with and without spaces between them."""
    draws = random.Random(0)
    return [
        "".join(
            draws.choice(parts) + draws.choice(["", " ", " ", " "]) for _ in range(WORDS)
        ).encode()
        for _ in range(TEXTS)
    ]
