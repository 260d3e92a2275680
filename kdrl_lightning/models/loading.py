"""Loading and saving models: from a folder, a hub name, or an object that makes a folder."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from kdrl_lightning.common.untyped import HFConfig, HFModel, HFTokenizer, Tree
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.architectures.generation import generation_config, read_generation
from kdrl_lightning.models.architectures.implementations import keep_precision, keep_soft_caps
from kdrl_lightning.models.architectures.load_errors import TOKENIZERS, reading, refuse_adapter
from kdrl_lightning.models.architectures.loaded import check_loaded
from kdrl_lightning.models.architectures.values import check_stored

# `Any`: the content of a JSON file; the classes of transformers have no types.


class ModelSource(ABC):
    """Base class of objects that name a model; ``path`` may create its folder first.

    Use it in place of a folder or hub name, see ``GGUFModel``.
    """

    @abstractmethod
    def path(self) -> str:
        """Return the folder or hub name of the model."""


def model_path(model: str | ModelSource) -> str:
    """Return the folder or hub name of ``model``; a source may create its folder first."""
    if isinstance(model, str):
        return model
    with torch.device("cpu"):  # a source may load a model while Lightning's default is the GPU
        return model.path()


def load_causal_lm(path: str, dtype: torch.dtype | str = "auto") -> HFModel:
    """Load a causal language model on the CPU, in evaluation mode, whatever the default device is.

    Dropout stays off, because rollouts and updates must see one policy.

    Args:
        path: folder or hub name.
        dtype: dtype of the weights; ``auto`` uses the checkpoint's.

    Raises:
        ConfigurationError: there is no model at ``path``, or its weights do not fit config.json.
    """
    from transformers import AutoModelForCausalLM

    generation = read_generation(path)
    given = {} if generation is None else {"generation_config": generation_config({})}
    with torch.device("cpu"):
        model, info = _load(
            AutoModelForCausalLM,
            path,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_loaded names them
            **given,
        )
    check_loaded(model, info, path)
    if Path(path).is_dir():
        check_stored(model, Path(path), info["unexpected_keys"], path)
    if generation is not None and model.can_generate():
        model.generation_config = generation_config(generation)
    keep_soft_caps(model)
    keep_precision(model)
    return model.eval()


def build_causal_lm(config: str, generation: str | None, weights: Mapping[str, Tensor]) -> HFModel:
    """Return a model that holds ``weights`` without copying them.

    Args:
        config: the model's configuration, as JSON.
        generation: its generation configuration, as JSON; None for none.
        weights: tensors by their names in the model.
    """
    from transformers import AutoModelForCausalLM

    settings = _configuration(config)
    settings.dtype = next(iter(weights.values())).dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    if generation is not None:
        model.generation_config = generation_config(json.loads(generation))
    return model


def _configuration(config: str) -> HFConfig:
    """Return transformers' configuration object for a whole configuration in JSON.

    The class of a nested configuration may refuse general settings that it wrote itself (DBRX), so
    we then leave out those that have their default.
    """
    from transformers import AutoConfig, PretrainedConfig

    values = json.loads(config, object_hook=decode_float)
    kind = values.pop("model_type")
    try:
        return AutoConfig.for_model(kind, **values)
    except ValueError:
        general = PretrainedConfig().to_dict()
        parts = {
            name: {k: v for k, v in part.items() if k not in general or general[k] != v}
            for name, part in values.items()
            if isinstance(part, dict)
        }
        return AutoConfig.for_model(kind, **{**values, **parts})


def decode_float(value: Tree) -> Any:
    """Decode a float that transformers writes as text, e.g. Mamba 2's infinite limit.

    JSON has no infinity. Any other value is returned as it is.

    >>> json.loads('{"limit": [0.0, {"__float__": "Infinity"}]}', object_hook=decode_float)
    {'limit': [0.0, inf]}
    """
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def all_settings(config: str) -> Tree:
    """Return the settings of a JSON configuration under the names of this transformers version."""
    plain: Tree = json.loads(config)
    try:
        return dict(json.loads(_configuration(config).to_json_string(use_diff=False)))
    except Exception:  # an unknown type, or values that this version refuses
        return plain


def save_causal_lm(
    model: HFModel, folder: str | Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Write a model as a Hugging Face folder, with its generation configuration unchanged.

    transformers reads generation configurations that it refuses to write, e.g. ``temperature``
    without ``do_sample``; we write them ourselves.

    Args:
        model: the transformers model.
        folder: the folder to write.
        weights: weights by name that replace the model's; None writes the model's.
    """
    generation = getattr(model, "generation_config", None)
    if generation is None or _is_valid(generation):
        model.save_pretrained(folder, state_dict=weights)
        return
    model.generation_config = type(generation)()
    try:
        model.save_pretrained(folder, state_dict=weights)
    finally:
        model.generation_config = generation
    generation.to_json_file(Path(folder) / "generation_config.json", use_diff=True)


def check_saves(model: HFModel, tokenizer: HFTokenizer) -> None:
    """Check, before a run starts, that configuration and tokenizer can be saved and loaded.

    Raises:
        ConfigurationError: one of them cannot be written or read again.
    """
    from transformers import AutoConfig, AutoTokenizer

    with TemporaryDirectory() as folder:
        for what, write in (
            ("configuration", lambda: model.config.save_pretrained(folder)),
            ("configuration", lambda: AutoConfig.from_pretrained(folder)),
            ("tokenizer", lambda: tokenizer.save_pretrained(folder)),
            ("tokenizer", lambda: AutoTokenizer.from_pretrained(folder)),
        ):
            try:
                write()
            except Exception as error:
                raise ConfigurationError(
                    f"the student's {what} must be one that transformers can save and load: got "
                    f"{type(error).__name__}: {' '.join(str(error).split())}. Correct the files in "
                    f"{model.config._name_or_path or 'its folder'}, or set `report.export` to "
                    "false."
                ) from error


def frozen_names(model: HFModel) -> set[str]:
    """Return the names of parameters that an architecture never trains.

    A model's class freezes them, e.g. a table of sine positions; loading weights makes them
    trainable.
    """
    from transformers.initialization import no_init_weights

    with no_init_weights(), torch.device("meta"):
        empty = type(model)(copy.deepcopy(model.config))
    return {name for name, p in empty.named_parameters() if not p.requires_grad}


def _is_valid(generation: HFConfig) -> bool:
    try:
        generation.validate(strict=True)
    except Exception:  # text instead of a number raises a TypeError
        return False
    return True


def empty_causal_lm(
    like: HFModel, device: torch.device | str, dtype: torch.dtype | None = None
) -> HFModel:
    """Return a model of the same class and configuration with uninitialised weights.

    If ``dtype`` is None, it is that of ``like``. Buffers that no checkpoint holds, such as rotary
    frequencies, have their usual values.
    """
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(like.config)
    with no_init_weights(), torch.device(device):
        model = type(like)._from_config(
            config, dtype=dtype or like.dtype, attn_implementation=config._attn_implementation
        )
    keep_precision(model)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def skeleton_causal_lm(path: str) -> HFModel:
    """Return the model of a folder on the ``meta`` device, to inspect its modules.

    Raises:
        ConfigurationError: there is no model at ``path``.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = load_config(path)
    with reading(path), no_init_weights(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def unfilled_causal_lm(path: str, dtype: torch.dtype | str) -> tuple[HFModel, Path]:
    """Build the model of a folder with weights that take no memory until they are written.

    Args:
        path: folder or hub name; the weight files of a hub name are downloaded.
        dtype: dtype of the weights; ``auto`` uses the configuration's.

    Returns:
        The model on the CPU in evaluation mode, and the folder with its weight files.

    Raises:
        ConfigurationError: there is no model at ``path``.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = load_config(path)
    chosen = getattr(config, "dtype", None) if dtype == "auto" else dtype
    chosen = getattr(torch, chosen) if isinstance(chosen, str) else chosen
    with reading(path), no_init_weights(), torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=chosen or torch.float32)
    model.tie_weights()
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))
    generation = read_generation(str(folder))
    if generation is not None and model.can_generate():
        model.generation_config = generation_config(generation)
    keep_soft_caps(model)
    keep_precision(model)
    return model.eval(), folder


def load_tokenizer(path: str) -> HFTokenizer:
    """Load a model's tokenizer, which must have an end token.

    Raises:
        ConfigurationError: there is no tokenizer at ``path``, its chat template is not text, it has
            no end token, or the model has no row for that token.
    """
    from transformers import AutoTokenizer

    refuse_adapter(path)
    if Path(path).is_dir() and not any((Path(path) / name).exists() for name in TOKENIZERS):
        # transformers would build an empty one.
        raise ConfigurationError(
            f"a model folder must hold its tokenizer: got {path} without one. "
            "Save it there with `tokenizer.save_pretrained`."
        )
    tokenizer = _load(AutoTokenizer, path, "tokenizer")
    with reading(path):
        end = load_config(path).get_text_config().vocab_size
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id >= end:
        raise ConfigurationError(
            f"the tokenizer of `{path}` must have an end token that the model knows (below {end}): "
            f"got {tokenizer.eos_token_id}. Set its `eos_token`."
        )
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str | dict | None):
        raise ConfigurationError(
            f"the `chat_template` of the tokenizer of {path} must be a text: got {template!r:.80}. "
            "Correct its tokenizer_config.json."
        )
    return tokenizer


def load_config(path: str) -> HFConfig:
    """Load a model's configuration.

    Raises:
        ConfigurationError: there is no model at ``path``.
    """
    from transformers import AutoConfig

    return _load(AutoConfig, path)


def _load(auto_class: Any, path: str, part: str = "model", **kwargs: Any) -> Any:
    with reading(path, part):
        # Without the flag, transformers asks at the terminal whether to run a folder's code.
        return auto_class.from_pretrained(path, trust_remote_code=False, **kwargs)
