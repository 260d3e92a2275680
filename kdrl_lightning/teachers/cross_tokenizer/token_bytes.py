"""The bytes that each token of a vocabulary writes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kdrl_lightning.common.untyped import HFTokenizer, Tree
from kdrl_lightning.errors import ConfigurationError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Steps of a decoder that we read, or that change no byte in the middle of a text.
KEPT = {"ByteLevel", "ByteFallback", "Fuse", "Strip"}


class TokenBytes:
    """Maps token ids to the bytes that they add to a text.

    We read the map from the settings of the tokenizer's decoder. We do not use ``decode``, because
    it replaces half characters, strips the first space and cleans up white space.

    Args:
        tokenizer: a tokenizer of transformers with a ``tokenizers`` backend: byte-level, or with
            ``▁`` for spaces (sentencepiece), with or without byte fallback.
        name: the model's name, for messages.
        ends: tokens that end a text, which count as special.

    Attributes:
        pieces: bytes of each id; None for special tokens, the unknown token and unused ids. One
            more None at the end stands for all ids above.
        lengths: ``[N + 1]`` int64, number of bytes of each id; 1 if its piece is None.
        plain: ``[N + 1]`` bool: the token is text.
        special: text of each special token by id.
        spec: the backend's settings, as in tokenizer.json.

    Raises:
        ConfigurationError: the tokenizer has no map from tokens to bytes.
    """

    def __init__(self, tokenizer: HFTokenizer, name: str, ends: Collection[int] = ()) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigurationError(
                f"the tokenizer of {name} must have a `tokenizers` backend, which says what bytes "
                f"a token writes: got {type(tokenizer).__name__}. Convert it to tokenizer.json."
            )
        self.name = name
        self.spec: Tree = json.loads(backend.to_str())
        added = {int(t["id"]): t for t in self.spec["added_tokens"]}
        marked = {*tokenizer.all_special_ids, *ends, *(i for i, t in added.items() if t["special"])}
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.special = {i: token for token, i in vocabulary.items() if i in marked}
        read = _reader(self.spec, name)
        unknown = unknown_token(self.spec["model"])
        self.pieces: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 2)
        for token, i in vocabulary.items():
            if i not in self.special and token != unknown and i != unknown:
                self.pieces[i] = token.encode() if i in added else read(token)
        self.plain = np.array([piece is not None for piece in self.pieces])
        self.lengths = np.array([1 if p is None else len(p) for p in self.pieces], np.int64)
        self.id_of_special = {text: i for i, text in self.special.items()}
        self.byte_ids = {
            piece: i
            for i, piece in reversed(list(enumerate(self.pieces)))
            if piece is not None and len(piece) == 1
        }

    def index(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return ids as indices into ``pieces``; ids above the vocabulary become the last one."""
        return np.minimum(ids, len(self.pieces) - 1)

    def text(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of plain tokens."""
        return b"".join(map(self.pieces.__getitem__, ids))  # type: ignore[arg-type]


def _reader(spec: Tree, name: str) -> Callable[[str], bytes]:
    """Return a function that maps a token of the model to its bytes.

    Raises:
        ConfigurationError: the decoder has a step whose bytes depend on neighbouring tokens.
    """
    kinds, spaces, odd = set(), set(), []
    for step in _flat(spec["decoder"]):
        kinds.add(step["type"])
        if step["type"] == "Metaspace":
            spaces.add(step["replacement"])
        elif step["type"] == "Replace" and step["content"] == " " and "String" in step["pattern"]:
            spaces.add(step["pattern"]["String"])
        elif step["type"] not in KEPT:
            odd.append(step["type"])
    odd += ["a suffix of words"] if spec["model"].get("end_of_word_suffix") else []
    if odd or not kinds:
        raise ConfigurationError(
            f"the tokenizer of {name} must have a decoder that keeps every byte (ByteLevel, or "
            f"Metaspace with byte fallback): got {', '.join(odd) or 'none'}, which loses white "
            "space. Choose a model with another tokenizer."
        )
    prefix = spec["model"].get("continuing_subword_prefix") or ""
    alphabet = byte_alphabet() if "ByteLevel" in kinds else {}

    def read(token: str) -> bytes:
        match = BYTE_TOKEN.fullmatch(token) if "ByteFallback" in kinds else None
        if match:
            return bytes([int(match[1], 16)])
        if prefix and token != prefix:
            token = token.removeprefix(prefix)
        for mark in spaces:
            token = token.replace(mark, " ")
        if alphabet and all(c in alphabet for c in token):
            return bytes(alphabet[c] for c in token)
        return token.encode()

    return read


def _flat(step: Tree | None) -> Iterator[Tree]:
    """Yield the steps of a decoder that may be a sequence of sequences."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for inner in step["decoders"]:
            yield from _flat(inner)
    else:
        yield step


def unknown_token(model: Tree) -> str | int | None:
    """Return the model's unknown token: its text, or its id (Unigram)."""
    return model.get("unk_token") or model.get("unk_id")


def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    GPT-2's table: printable bytes stand for themselves, the others for characters from 256 on.

    >>> byte_alphabet()["Ġ"], byte_alphabet()["a"]
    (32, 97)
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
