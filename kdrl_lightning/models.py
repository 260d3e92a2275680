"""Where models come from: a folder, a hub name, or an object that can produce a folder."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from kdrl_lightning.errors import ConfigurationError


class ModelSource(ABC):
    """Anything that can name a Hugging Face model folder, making it first if need be."""

    @abstractmethod
    def path(self) -> str:
        """Return the folder (or hub name) of the model."""


def model_path(model: str | ModelSource) -> str:
    """Return the folder or hub name behind ``model``."""
    return model if isinstance(model, str) else model.path()


def load_causal_lm(path: str, dtype: torch.dtype | str = "auto") -> Any:
    """Load a causal language model in evaluation mode (rollouts and updates must see one policy).

    Raises:
        ConfigurationError: there is no model at ``path``.
    """
    from transformers import AutoModelForCausalLM

    model = _load(AutoModelForCausalLM, path, dtype=dtype)
    return model.eval()


def build_causal_lm(
    config: str, generation_config: str | None, weights: Mapping[str, Tensor]
) -> Any:
    """Return a model of a configuration, as JSON, that holds ``weights`` without copying them."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    values = json.loads(config)
    own = AutoConfig.for_model(values.pop("model_type"), **values)
    own.dtype = next(iter(weights.values())).dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(own)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    if generation_config is not None:
        model.generation_config = GenerationConfig.from_dict(json.loads(generation_config))
    return model


def load_tokenizer(path: str) -> Any:
    """Load the tokenizer that lies beside a model; it must know an end token.

    Raises:
        ConfigurationError: there is no tokenizer at ``path``, or it has no end token.
    """
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
    if Path(path).is_dir() and not any((Path(path) / name).exists() for name in files):
        # transformers would make one up.
        raise ConfigurationError(
            f"a model folder must hold its tokenizer: got {path} without one. "
            "Save it there with `tokenizer.save_pretrained`."
        )
    tokenizer, end = _load(AutoTokenizer, path), load_config(path).get_text_config().vocab_size
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= end:
        raise ConfigurationError(
            f"the tokenizer of `{path}` must have an end token that the model knows (below {end}): "
            f"got {tokenizer.eos_token_id}. Set `eos_token` in it."
        )
    return tokenizer


def load_config(path: str) -> Any:
    """Load the model's configuration.

    Raises:
        ConfigurationError: there is no model at ``path``.
    """
    from transformers import AutoConfig

    return _load(AutoConfig, path)


def check_same_vocabulary(student: Any, teacher: Any, student_path: str, teacher_path: str) -> None:
    """Refuse a teacher whose token ids mean something else than the student's.

    Rows that only one of the two has (padding of the embedding matrix) are allowed.

    Raises:
        ConfigurationError: an id stands for different tokens, or the end tokens differ.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    by_id = {index: token for token, index in theirs.items()}
    different = [(i, t, by_id[i]) for t, i in ours.items() if i in by_id and by_id[i] != t]
    missing = [(i, t) for t, i in ours.items() if i not in by_id]
    if not different and not missing and student.eos_token_id == teacher.eos_token_id:
        return
    if different:
        index, token, other = min(different)
        found = f"{len(different)} ids differ, first {index}: {token!r} against {other!r}"
    elif missing:
        index, token = min(missing)
        found = f"{len(missing)} of the student's ids are unknown, first {index}: {token!r}"
    else:
        found = f"end tokens {student.eos_token_id} and {teacher.eos_token_id}"
    raise ConfigurationError(
        f"student and teacher must share one vocabulary: got {found} "
        f"(student {student_path}, teacher {teacher_path}). Choose a teacher of the same family."
    )


def _load(auto_class: Any, path: str, **kwargs: Any) -> Any:
    try:
        return auto_class.from_pretrained(path, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        local = "exists" if Path(path).is_dir() else "is not a local folder"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ConfigurationError(
            f"a model path must be a Hugging Face folder or hub name: got {path} ({local}; "
            f"{reason}). Check the spelling, or download the model first."
        ) from error
