"""The tokenizers of the embedded models: a token per character, or one for two digits."""

from __future__ import annotations

from typing import Any

from kdrl_lightning.common.untyped import HFTokenizer
from kdrl_lightning.tiny.addition import SYMBOLS

# `Any`: transformers' annotations are wrong or missing.


def make_tokenizer() -> HFTokenizer:
    """Return a tokenizer with one token per character, plus padding and end token.

    It is a Qwen2 tokenizer, because transformers loads one for every Qwen2 folder.
    """
    from transformers import Qwen2Tokenizer

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *SYMBOLS])}
    make: Any = Qwen2Tokenizer  # its annotation forbids having no unknown token
    return make(vocab=vocabulary, merges=[], pad_token="<pad>", eos_token="<eos>", unk_token=None)


def make_merging_tokenizer() -> HFTokenizer:
    """Return a tokenizer that merges the digits of numbers in pairs, from the left."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pairs = [(a, b) for a in SYMBOLS[:10] for b in SYMBOLS[:10]]
    tokens = ["<pad>", "<eos>", *SYMBOLS, *(a + b for a, b in pairs)]
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{1,2}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    make: Any = PreTrainedTokenizerFast  # transformers does not annotate it
    return make(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
