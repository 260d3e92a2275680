"""Turns errors of loading a model into one line that names the cause and the cure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer

from kdrl_lightning.common.untyped import Tree
from kdrl_lightning.errors import ConfigurationError

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
AGAIN = "Download the model again."
FETCH = "Run `git lfs pull` in it."


@contextmanager
def reading(path: str, part: str = "model") -> Iterator[None]:
    """Turn an error inside the context, which loads a model, into one line with cause and cure.

    Args:
        path: folder or hub name of the model.
        part: what the context loads: `model` or `tokenizer`.

    Raises:
        ConfigurationError: ``path`` is an adapter, or loading fails inside the context.
    """
    refuse_adapter(path)
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, ConfigurationError):
        raise
    except StrictDataclassError as error:
        raise ConfigurationError(
            f"the model's config.json must be valid for transformers: got {path} "
            f"({' '.join(str(error).split())}). Correct that value."
        ) from error
    except Exception as error:  # transformers raises errors of many types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        if reason.startswith("Unrecognized configuration class"):
            raise ConfigurationError(
                f"a model must be a causal language model: got {path}, a "
                f"{_settings(path).get('model_type', 'model')} that transformers does not load as "
                "one. Use a text model, or save the text part of this one separately."
            ) from error
        folder = Path(path) if Path(path).is_dir() else _cached(path)
        if folder is not None:
            rule, cure = _cause(folder, error, part)
            raise ConfigurationError(
                f"a model folder must {rule}: got {path} (exists; {reason}). {cure}"
            ) from error
        raise ConfigurationError(
            f"a model path must be a Hugging Face folder or hub name: got {path} "
            f"({'is a file' if Path(path).is_file() else 'is not a local folder'}; {reason}). "
            + _cure_of_name(path, reason)
        ) from error


def _cure_of_name(path: str, reason: str) -> str:
    if Path(path).is_file():
        return "Name a folder; `export` writes one from a checkpoint."
    if "gated" in reason:
        return "Accept its terms on its page and log in with `hf auth login`."
    return "Check the spelling, or download the model first."


def _cached(name: str) -> Path | None:
    """Return the cached folder of a hub name, or None if it was not downloaded."""
    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # not a hub name
        return None
    return Path(found).parent if isinstance(found, str) else None


def _cause(folder: Path, error: Exception, part: str) -> tuple[str, str]:
    """Return the rule that a local folder breaks, and the cure."""
    found = _of_configuration(folder)
    if found is not None:
        return found
    if part == "tokenizer":
        return _of_tokenizer(folder)
    kind = _settings(str(folder)).get("quantization_config")
    if isinstance(kind, dict):
        return _of_quantization(kind, error)
    if kind is not None:
        rule = "hold a `quantization_config` with settings by name"
        return rule, "Correct it in config.json, or name the folder of the unquantized model."
    return _of_weights(folder, error)


def _of_tokenizer(folder: Path) -> tuple[str, str]:
    """Return the rule that the files of a tokenizer break, and the cure."""
    files = [folder / name for name in (*TOKENIZERS, *TOKENIZER_SETTINGS)]
    present = [file for file in files if file.is_file()]
    pointer = next((file for file in present if _is_pointer(file)), None)
    if pointer is not None:
        return f"hold its tokenizer, not pointers to it as {pointer.name}", FETCH
    for file in present:
        if file.suffix == ".json":
            try:
                settings = json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                return f"hold a {file.name} that is JSON", AGAIN
            if not isinstance(settings, dict):
                return f"hold a {file.name} with settings by name", AGAIN
    names = [file.name for file in present if file.name in TOKENIZERS]
    if (folder / "tokenizer.json").is_file():
        names = ["tokenizer.json"]
        with suppress(Exception):  # the Rust library raises no narrower type
            Tokenizer.from_file(str(folder / "tokenizer.json"))
            names = ["tokenizer_config.json"]
    rule = "hold a tokenizer that transformers can load"
    return rule, f"Correct {' or '.join(names)}, or download the tokenizer again."


def _of_quantization(settings: Tree, error: Exception) -> tuple[str, str]:
    name = settings.get("quant_method")
    other = "or name the folder of the unquantized model."
    flag = next((f for f in ("load_in_4bit", "load_in_8bit") if settings.get(f)), None)
    if flag is not None and name is not None and not str(name).startswith("bitsandbytes"):
        # transformers reads these flags before the method.
        return (
            f"not name {name} in its `quantization_config` together with `{flag}`, which means "
            "bitsandbytes",
            f"Remove `{flag}` from config.json, {other}",
        )
    if flag is None and name is None:
        rule = "name the `quant_method` of its `quantization_config`"
        return rule, f"Add it to config.json, {other}"
    name = name or "bitsandbytes"
    if isinstance(error, ImportError) or "install" in str(error):
        rule = f"hold weights that this installation can read, and {name} needs more"
        return rule, f"Install what the error asks for, {other}"
    rule = f"hold a `quantization_config` that transformers can use for {name}"
    return rule, f"Correct it in config.json, {other}"


def _of_configuration(folder: Path) -> tuple[str, str] | None:
    """Return the rule that ``config.json`` breaks and its cure; None if it can be used."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not (folder / "config.json").is_file():
        if any((folder / name).is_file() for name in TOKENIZERS):
            return "hold a config.json, not a tokenizer alone", "Name the whole model's folder."
        if any(folder.glob("*.distcp")):
            return "hold a config.json", "Turn a checkpoint into a model with `export` first."
        return "hold a config.json", "Name the folder that `save_pretrained` wrote."
    try:
        settings = json.loads((folder / "config.json").read_text())
    except ValueError:
        return "hold a config.json that is JSON", AGAIN
    if not isinstance(settings, dict):
        return "hold a config.json with settings by name", AGAIN
    kind = settings.get("model_type")
    if not isinstance(kind, str):
        return "name its `model_type` in config.json", "Add its name, e.g. `qwen3`."
    if kind in CONFIG_MAPPING:
        return None
    if "auto_map" in settings:
        return (
            f"not need code from its folder, and {kind} does",
            "Such code is never run: use a version of the model that transformers itself supports.",
        )
    return (
        f"hold an architecture that transformers {transformers.__version__} knows, not {kind}",
        "Install a version that does, or correct `model_type` in config.json.",
    )


def _of_weights(folder: Path, error: Exception) -> tuple[str, str]:
    files = [file for pattern in WEIGHTS for file in folder.glob(pattern)]
    if not files:
        return "hold its weights (*.safetensors)", AGAIN
    if any(map(_is_pointer, files)):
        return "hold its weights, not pointers to them", FETCH
    for index in folder.glob("*.index.json"):
        try:
            named = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"hold an {index.name} that can be read", AGAIN
        absent = sorted(name for name in named if not (folder / name).is_file())
        if absent:
            return f"hold all files that {index.name} names, and {absent[0]} is missing", AGAIN
    if isinstance(error, SafetensorError | UnpicklingError | EOFError):
        return "hold whole files of weights", AGAIN
    if _builds(folder):
        return "hold weights that transformers can load", AGAIN
    known = isinstance(error, KeyError) and str(error.args[0]).replace("_", "").isalnum()
    what = f"`{error.args[0]}` in its files" if known else "its config.json"
    return "be one that transformers can load", f"Correct {what}, or download the model again."


def _is_pointer(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(20) == b"version https://git-"


def _builds(folder: Path) -> bool:
    """Return whether the configuration describes a model, whatever the weights are."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except Exception:  # transformers raises errors of many types
        return False
    return True


def _settings(path: str) -> Tree:
    from transformers import PretrainedConfig

    return dict(PretrainedConfig.get_config_dict(path)[0])


def refuse_adapter(path: str) -> None:
    """Refuse a folder that holds an adapter, for which transformers may load the base model.

    Raises:
        ConfigurationError: the folder holds an ``adapter_config.json``.
    """
    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        return
    try:
        base = json.loads(file.read_text()).get("base_model_name_or_path")
    except ValueError:
        base = None
    whole = (Path(path) / "config.json").is_file()
    raise ConfigurationError(
        f"a model path must hold a whole model: got {path}, an adapter of {base or 'another model'}"
        ". Merge it first (peft: `AutoPeftModelForCausalLM.from_pretrained(...)`, then "
        "`merge_and_unload().save_pretrained(...)`), or train new adapters on the base with `lora`."
        + (" If its weights are merged, remove adapter_config.json." if whole else "")
    )
