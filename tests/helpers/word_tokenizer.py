"""A small tokenizer that puts the special tokens of a test's choice around a text."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# User turns in "u ... ;", the assistant's in "a ... ;", written after BOS.
CHAT = (
    "{{ bos_token }}{% if tools %}T {{ tools | length }} {% endif %}"
    "{% for m in messages %}{{ {'user': 'u', 'assistant': 'a', 'system': 's', 'tool': 't'}"
    "[m['role']] }} {{ m['content'] }} ; {% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)
WORDS = ["<bos>", "<eos>", "<pad>", "1", "2", "3", "+", "=", ";", "u", "a", "s", "t", "T", "x", "?"]


def word_tokenizer(around: str = "$A", template: str | None = CHAT) -> Any:
    """Return a tokenizer of words; ``around`` is the template of an encoded text ``$A``.

    >>> tokenizer = word_tokenizer("<bos> $A <eos>")
    >>> tokenizer("1 + 2")["input_ids"], tokenizer("1", add_special_tokens=False)["input_ids"]
    ([0, 3, 6, 4, 1], [3])
    """
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    inner.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[("<bos>", 0), ("<eos>", 1), ("x", 14)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer
