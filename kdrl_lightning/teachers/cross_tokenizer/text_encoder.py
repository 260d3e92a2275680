"""Encodes bytes in the middle of a text, so that the tokens write exactly these bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from tokenizers import Tokenizer

from kdrl_lightning.common.untyped import Tree
from kdrl_lightning.teachers.cross_tokenizer.token_bytes import TokenBytes, unknown_token

# Normalisers that add a space at the start of a text, or compose characters. A completion is the
# middle of a text, and the teacher must score the characters that the student wrote.
LEFT_OUT = {"Prepend", "NFC", "NFD", "NFKC", "NFKD"}
# What replaces a special token in Unigram's vocabulary, and its score: no text has this code point.
NONCHARACTER, LEAST = "\U0010ffff", -1e6
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
        spec |= _without_special(spec, tokens.special)
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


def _without_special(spec: Tree, special: Mapping[int, str]) -> Tree:
    """Return model and added tokens so that no text becomes a special token.

    ``encode_special_tokens`` does not suffice: Unigram and WordPiece take the name of a special
    token for a word of their vocabulary, and a model may end with a token that is not marked as
    special. An unknown token that the model knows by its name stays.

    Args:
        spec: JSON form of the tokenizer.
        special: text of each special token by id.
    """
    model, unknown = dict(spec["model"]), unknown_token(spec["model"])
    names = {i: text for i, text in special.items() if text != unknown}
    if isinstance(model.get("vocab"), list):  # of Unigram: an id is an index into the list
        model["vocab"] = [
            [f"{NONCHARACTER}{i}", LEAST] if i in names or i == unknown else entry
            for i, entry in enumerate(model["vocab"])
        ]
    elif model["type"] != "BPE" or model.get("ignore_merges"):
        hidden = set(names.values())
        model["vocab"] = {text: i for text, i in model["vocab"].items() if text not in hidden}
    added = [token for token in spec["added_tokens"] if token["id"] not in names]
    return {"model": model, "added_tokens": added}


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
