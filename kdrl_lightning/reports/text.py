"""Tokens as the pieces of text that they add, and text without anything invisible.

Written by hand: tokenizers' ``DecodeStream`` needs a fast tokenizer, gives nothing for the bytes of
a broken character, and does not say which token a character was finished by.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

# A character of UTF-8 has at most 4 bytes: more tokens than that do not wait for its end.
LONGEST = 4
BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
MARKS = {"\u200e", "\u200f", "\u061c"}
BROKEN = "\ufffd"


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds; put together they are the decoded whole.

    A character that several byte-level tokens make stands at its last one; the others add an empty
    text. Special tokens are shown.

    Args:
        tokenizer: a Hugging Face tokenizer.
        ids: of one completion.
    """

    def decode(start: int, end: int) -> str:
        return str(
            tokenizer.decode(
                ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    out = []
    # What lies before ``start`` is written; decoding begins a token earlier than the new text, for
    # some tokenizers drop the space at the beginning of what they decode.
    before, start = 0, 0
    for end in range(1, len(ids) + 1):
        known, text = decode(before, start), decode(before, end)
        waits = text.endswith(BROKEN) and end < len(ids) and end - start < LONGEST
        if waits or len(text) < len(known):
            out.append("")
            continue
        out.append(text[len(known) :])
        before, start = start, end
    return out


def visible(text: str) -> str:
    r"""Replace what cannot be seen, or would change the order of other text, by what can.

    Control characters become their pictures, direction marks and halves of surrogate pairs their
    code points; line ends stay and get a sign, as tabs do.

    >>> visible("a\x00b\n")
    'a␀b↵\n'
    """
    return "".join(_visible(c) for c in text)


def _visible(char: str) -> str:
    code = ord(char)
    if char == "\n":
        return "↵\n"
    if char == "\t":
        return "⇥\t"
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    hidden = unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")
    if hidden or char in MARKS or unicodedata.bidirectional(char) in BIDI:
        return f"⟨U+{code:04X}⟩"
    return char
