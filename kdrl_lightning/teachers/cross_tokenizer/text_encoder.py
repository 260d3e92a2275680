"""Encodes bytes in the middle of a text, so that the tokens write exactly these bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer

from kdrl_lightning.common.untyped import Tree
from kdrl_lightning.teachers.cross_tokenizer.token_bytes import TokenBytes

# Normalisers that add a space at the start of a text, or compose characters. A completion is the
# middle of a text, and the teacher is to score the characters that the student wrote.
LEFT_OUT = {"Prepend", "NFC", "NFD", "NFKC", "NFKD"}
# Id of a byte for which a vocabulary has no token.
NO_TOKEN = -1


class TextEncoder:
    """Encodes completions with a model's tokenizer.

    It adds nothing (no BOS, no space in front), reads the names of special tokens as text, does not
    compose characters, and encodes bytes that are not valid UTF-8 one by one.

    Args:
        tokens: the vocabulary and its bytes.
    """

    def __init__(self, tokens: TokenBytes) -> None:
        spec = dict(tokens.spec)
        spec |= {"post_processor": None, "truncation": None, "padding": None}
        spec["normalizer"] = _inner(spec["normalizer"], "normalizers")
        spec["pre_tokenizer"] = _inner(spec["pre_tokenizer"], "pretokenizers")
        self._tokenizer = Tokenizer.from_str(json.dumps(spec))
        # A student that writes "<|im_end|>" letter by letter has not ended its turn.
        self._tokenizer.encode_special_tokens = True
        self._bytes = tokens.byte_ids

    def __call__(self, texts: Sequence[bytes]) -> list[list[int]]:
        """Return the token ids of each text; ``NO_TOKEN`` for a stray byte without a token.

        Args:
            texts: completions or parts of them; they may begin or end within a character.
        """
        parts: list[str | bytes] = []
        counts = []
        for text in texts:
            before = len(parts)
            parts += _valid(text)
            counts.append(len(parts) - before)
        words = [part for part in parts if isinstance(part, str)]
        encoded = iter(self._tokenizer.encode_batch_fast(words, add_special_tokens=False))
        ids = [
            next(encoded).ids
            if isinstance(part, str)
            else [self._bytes.get(part[i : i + 1], NO_TOKEN) for i in range(len(part))]
            for part in parts
        ]
        out, start = [], 0
        for count in counts:
            own = ids[start : start + count]
            out.append(own[0] if count == 1 else [i for part in own for i in part])
            start += count
        return out


def _valid(text: bytes) -> Iterator[str | bytes]:
    r"""Yield the valid parts of a text as strings, and the bytes between them.

    >>> list(_valid(b"a\xf0\x9fb")), list(_valid(b"ab"))
    (['a', b'\xf0\x9f', 'b'], ['ab'])
    """
    while text:
        try:
            yield text.decode()
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield text[: error.start].decode()
            yield text[error.start : error.end]
            text = text[error.end :]


def _inner(step: Tree | None, parts: str) -> Tree | None:
    """Return a normaliser or pre-tokenizer for the middle of a text; None if nothing is left."""
    if step is None or step["type"] in LEFT_OUT:
        return None
    if step["type"] == "Sequence":
        kept = [one for one in (_inner(s, parts) for s in step[parts]) if one is not None]
        return {**step, parts: kept} if kept else None
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    return {**step, "add_prefix_space": False} if "add_prefix_space" in step else step
