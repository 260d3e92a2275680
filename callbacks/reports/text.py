"""Finds the text that each token adds, and makes invisible characters visible.

We do not use tokenizers' ``DecodeStream``, because it needs a fast tokenizer, returns nothing for
the bytes of a broken character, and does not say which token completes a character.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from kdrl_lightning.common.untyped import HFTokenizer

# A UTF-8 character has at most 4 bytes, so no more than 4 tokens wait for its last byte.
LONGEST = 4
BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
MARKS = {"\u200e", "\u200f", "\u061c"}
BROKEN = "\ufffd"


def token_texts(tokenizer: HFTokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds; joined, the texts are the decoded completion.

    If several byte-level tokens form one character, the last one gets it and the others get an
    empty text. Special tokens keep their text.

    Args:
        tokenizer: a Hugging Face tokenizer.
        ids: the token ids of one completion, T of them.

    Returns:
        T texts.
    """

    def decode(start: int, end: int) -> str:
        return str(
            tokenizer.decode(
                ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    out = []
    # The text before ``start`` is complete. Decoding begins one token earlier than the new text,
    # because some tokenizers drop a space at the beginning of the decoded text.
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
    r"""Replace characters that are invisible or change the text direction with visible ones.

    Control characters become their Unicode symbols; direction marks and halves of surrogate pairs
    become their code points. Line breaks and tabs stay, with a sign before them.

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
