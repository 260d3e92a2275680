"""What we know of a model before it is loaded: path, tokenizer, end tokens and limits."""

from __future__ import annotations

from functools import cached_property
from hashlib import sha256

from kdrl_lightning.common.untyped import HFTokenizer
from kdrl_lightning.models.end_tokens import EndTokens, end_tokens
from kdrl_lightning.models.loading import ModelSource, load_config, load_tokenizer, model_path


class Pretrained:
    """Reads tokenizer and configuration of a Hugging Face folder when they are needed.

    Args:
        source: folder, hub name, or model source.
    """

    def __init__(self, source: str | ModelSource) -> None:
        self.source = source

    @property
    def path(self) -> str:
        """Folder or hub name; a model source creates its folder first."""
        return model_path(self.source)

    @cached_property
    def tokenizer(self) -> HFTokenizer:
        """The model's tokenizer."""
        return load_tokenizer(self.path)

    @cached_property
    def end_tokens(self) -> EndTokens:
        """The tokens that end a completion."""
        return end_tokens(self.path, self.tokenizer)

    @cached_property
    def vocabulary(self) -> str:
        """Checksum of the tokenizer's tokens and their ids."""
        tokens = sorted(self.tokenizer.get_vocab().items())
        return sha256(repr(tokens).encode(errors="surrogatepass")).hexdigest()

    @property
    def context_length(self) -> int:
        """Maximum length of prompt plus completion, in tokens."""
        return context_length(self.path)

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the model's embedding: every token id must be smaller."""
        return int(load_config(self.path).get_text_config().vocab_size)


class StudentFacts:
    """Gives a module the properties of its student that are known before training.

    Attributes:
        pretrained: the student.
    """

    pretrained: Pretrained

    @property
    def student_path(self) -> str:
        """Folder or hub name of the student before training."""
        return self.pretrained.path

    @property
    def tokenizer(self) -> HFTokenizer:  # transformers has no type that all tokenizers share
        """The student's tokenizer."""
        return self.pretrained.tokenizer

    @property
    def vocabulary(self) -> str:
        """Checksum of the student's tokens and their ids."""
        return self.pretrained.vocabulary

    @property
    def end_tokens(self) -> EndTokens:
        """The tokens that end a completion of the student."""
        return self.pretrained.end_tokens

    @property
    def context_length(self) -> int:
        """Maximum length of prompt plus completion, in tokens."""
        return self.pretrained.context_length

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the student's embedding: every token id must be smaller."""
        return self.pretrained.vocabulary_rows


def context_length(path: str) -> int:
    """Return a model's maximum length of prompt plus completion, in tokens.

    It is 2^30 if the configuration has no ``max_position_embeddings``.

    Args:
        path: folder or hub name of the model.
    """
    config = load_config(path).get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)
