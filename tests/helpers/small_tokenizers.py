"""Small tokenizers of every kind that the package can align, trained on a text or made by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<eos>", "<unk>"]
BYTES = pre_tokenizers.ByteLevel.alphabet()
TEXT = (
    "The answer of 12 + 345 is 357, isn't it?\n\n  One  more: 3.14 = x; y\tz. "
    "Größe, café, naïve, 数学の問題, Ответ, مرحبا بالعالم, שלום, 🙂👍🏽 👨‍👩‍👧.\r\n"
)
KINDS = ["bytes", "bpe", "prefixed", "digits", "sentencepiece", "metaspace", "unigram", "wordpiece"]


def make(kind: str, text: str = TEXT, size: int = 420) -> Any:
    """Return a tokenizer of a kind, trained on a text."""
    tokenizer = _trained(kind, [text] * 3, size)
    return wrapped(tokenizer)


def wrapped(tokenizer: Tokenizer, **settings: Any) -> Any:
    settings = {"eos_token": "<eos>", "pad_token": "<pad>", **settings}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **settings
    )


def _trained(kind: str, texts: Sequence[str], size: int) -> Tokenizer:
    if kind in ("bytes", "bpe", "prefixed", "digits"):
        made = Tokenizer(models.BPE())
        steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefixed")]
        if kind == "digits":
            made.normalizer = normalizers.NFC()  # as Qwen's
            steps = [pre_tokenizers.Digits(individual_digits=True), *steps]
        made.pre_tokenizer = pre_tokenizers.Sequence(steps)
        made.decoder = decoders.ByteLevel()
        made.post_processor = processors.TemplateProcessing(
            single="<eos> $A", special_tokens=[("<eos>", 1)]
        )
        most = 259 if kind == "bytes" else size
        trainer: Any = trainers.BpeTrainer(
            vocab_size=most, special_tokens=SPECIAL, initial_alphabet=BYTES, show_progress=False
        )
    elif kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=10_000))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.WordPieceTrainer(
            vocab_size=size + 256,
            special_tokens=SPECIAL,
            initial_alphabet=BYTES,
            show_progress=False,
        )
    elif kind in ("unigram", "unigram_bytes"):
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        )
    else:  # sentencepiece's BPE, as Llama 2 and Mistral have it
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        if kind == "metaspace":
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        else:
            space = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            made.normalizer = normalizers.Sequence(space)
        made.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        fallback = [f"<0x{b:02X}>" for b in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=size + 256, special_tokens=[*SPECIAL, *fallback], show_progress=False
        )
    made.train_from_iterator(texts, trainer)
    # Byte tokens are ordinary entries of the vocabulary.
    spec = json.loads(made.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in SPECIAL]
    if kind == "unigram_bytes":  # as sentencepiece's Unigram with byte fallback
        spec["model"]["vocab"] += [[f"<0x{b:02X}>", -20.0] for b in range(256)]
        spec["model"]["byte_fallback"] = True
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        made.decoder = decoders.Sequence(steps)
        spec["decoder"] = json.loads(made.to_str())["decoder"]
    return Tokenizer.from_str(json.dumps(spec))


def by_hand(pieces: Sequence[str], merges: Sequence[tuple[str, str]] = ()) -> Any:
    """Return a byte-level BPE of the given pieces, with ``<pad>`` 0 and ``<eos>`` 1."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL[:2], *pieces])}
    made = Tokenizer(models.BPE(vocabulary, list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL[:2]])
    return wrapped(made)
