"""The embedded teacher and student: small Qwen2 models for column addition.

The package ships the models that the configurations use, so that every machine starts from the
same weights. A model with another slip, seed or number of digits is trained on first use. Both
kinds are kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdrl_lightning import __version__
from kdrl_lightning.errors import ConfigurationError, require_between, require_count
from kdrl_lightning.models.folder_cache import cached_folder
from kdrl_lightning.models.loading import ModelSource
from kdrl_lightning.prompts.base import PromptSource
from kdrl_lightning.tiny.addition import SYMBOLS, AdditionTraces
from kdrl_lightning.tiny.tokenizers import make_merging_tokenizer as make_merging_tokenizer
from kdrl_lightning.tiny.tokenizers import make_tokenizer as make_tokenizer
from kdrl_lightning.tiny.training import repeatable, train_on_traces, warmed_up

# `Any`: transformers has no type that all tokenizers share; torch's closures.


@dataclass(frozen=True)
class Recipe:
    """Shape of a model and settings of its supervised training.

    Attributes:
        width: hidden size; heads are 32 wide, as vLLM's CPU kernels need.
        layers: number of transformer layers.
        steps: optimizer steps; the learning rate rises over the first tenth, then falls to 0.
        batch_size: worked additions per step; each is seen once.
        lr: peak learning rate.
        merged: two digits are one token.
        muon: train the layers' matrices with Muon. It teaches the student its misconception more
            exactly: a student that also writes carries that do not exist hardly improves under RL.
        shown: share of the worked additions whose prompt shows the right one first.
    """

    width: int
    layers: int
    steps: int
    lr: float
    muon: bool
    batch_size: int = 32
    # Not in `repr`, which names the shipped files: those are older than these fields.
    merged: bool = field(default=False, repr=False)
    shown: float = field(default=0.0, repr=False)


RECIPES = {
    "teacher": Recipe(width=128, layers=3, steps=600, lr=3e-3, muon=False),
    "merging_teacher": Recipe(width=128, layers=3, steps=1200, lr=3e-3, muon=False, merged=True),
    "student": Recipe(width=96, layers=2, steps=900, lr=6e-3, muon=True, batch_size=48),
    "reader": Recipe(width=96, layers=2, steps=900, lr=6e-3, muon=True, batch_size=48, shown=0.5),
}

SHIPPED = Path(__file__).parent / "shipped"


class TinyModel(ModelSource):
    """Model source for column addition: unpacks a shipped model, or trains it on first use.

    The student has a misconception: the annotator of its training data forgets each carry with
    probability ``slip``. So the student rarely samples the right step, but sometimes it does. The
    reader is a student that copies a worked answer if its prompt shows one, so it can teach itself.
    Models are kept in the cache folder.

    Args:
        role: ``teacher`` (correct traces), ``student``, ``reader``, or ``merging_teacher``, a
            teacher whose tokenizer writes two digits as one token (see ``CrossTokenizerTeacher``).
        slip: probability that a carry is forgotten in the data of student and reader, in [0, 1];
            the teachers' data is always correct.
        digits: digits of each number, 1 to 9.
        seed: seed of the initial weights and the data.
    """

    def __init__(
        self,
        role: Literal["teacher", "student", "reader", "merging_teacher"],
        slip: float = 0.9,
        digits: int = 4,
        seed: int = 0,
    ) -> None:
        if role not in RECIPES:
            raise ConfigurationError(
                f"`role` must be one of {', '.join(RECIPES)}: got {role}. Choose one of them."
            )
        require_between("slip", slip, 0.0, 1.0)
        require_count("digits", digits, 1, 9)
        require_count("seed", seed, 0, float("inf"))
        self.role = role
        self.slip = 0.0 if role.endswith("teacher") else slip  # a teacher writes all carries
        self.digits = digits
        self.seed = seed

    @property
    def recipe_name(self) -> str:
        """Name made of the settings that determine the weights."""
        slip = "" if self.role.endswith("teacher") else f"-slip{float(self.slip)!r}"
        recipe = RECIPES[self.role]
        text = f"{recipe!r}, shown={recipe.shown!r}" if recipe.shown else repr(recipe)
        key = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"addition{self.digits}-{self.role}{slip}-seed{self.seed}-{key}"

    @property
    def name(self) -> str:
        """Folder name in the cache; it changes with recipe, package version and torch version."""
        return f"{self.recipe_name}-{__version__}-torch{torch.__version__}"

    def traces(self, size: int) -> PromptSource:
        """Return the worked problems that the model is trained on."""
        shown = RECIPES[self.role].shown
        return AdditionTraces(size, self.seed, self.digits, self.slip, shown)

    def path(self) -> str:
        """Return the model's folder; make it if the cache does not have it."""
        return str(cached_folder(self.name, self._make))

    def _make(self, folder: Path) -> None:
        shipped = SHIPPED / f"{self.recipe_name}.safetensors"
        if shipped.exists():
            unpack(shipped, RECIPES[self.role], folder)
        else:
            self.train(folder)

    def train(self, folder: Path) -> None:
        """Train the model from its seed and write it to ``folder``; the cache is not used."""
        began = time.perf_counter()
        recipe = RECIPES[self.role]
        with repeatable() as start:
            save_untrained(recipe, Path(start), self.seed)
            train_on_traces(
                start,
                self.traces(recipe.steps * recipe.batch_size),
                str(folder),
                optimizer=lambda p: make_optimizer(list(p), recipe),
                rate=warmed_up(recipe.steps),
                steps=recipe.steps,
                batch_size=recipe.batch_size,
                name=f"embedded {self.role}",
                seed=self.seed,
            )
        print(f"embedded {self.role} made in {time.perf_counter() - began:.0f} s: {self.name}")


def pack(folder: Path, file: Path) -> str:
    """Write the weights of a model folder to ``file`` in half precision; return its SHA-256."""
    weights = load_file(folder / "model.safetensors")
    file.parent.mkdir(exist_ok=True)
    save_file({name: tensor.half() for name, tensor in weights.items()}, file)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def shipped_checksum(name: str) -> str | None:
    """Return the SHA-256 that a shipped file must have; None if ``SHA256SUMS`` does not list it."""
    lines = (SHIPPED / "SHA256SUMS").read_text().splitlines()
    return {file: checksum for checksum, file in map(str.split, lines)}.get(name)


def unpack(file: Path, recipe: Recipe, folder: Path) -> None:
    """Write the Hugging Face folder of a shipped model.

    Raises:
        ConfigurationError: the file's checksum is not the one in ``SHA256SUMS``.
    """
    found, expected = hashlib.sha256(file.read_bytes()).hexdigest(), shipped_checksum(file.name)
    if found != expected:
        raise ConfigurationError(
            f"{file.name} must have the checksum {expected}: got {found}. Install the package "
            "again, or run `python -m kdrl_lightning.tiny`."
        )
    save_untrained(recipe, folder, seed=0)
    weights = {name: tensor.float() for name, tensor in load_file(file).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def save_untrained(recipe: Recipe, folder: Path, seed: int) -> None:
    """Write a randomly initialised model and its tokenizer as a Hugging Face folder.

    It is a Qwen2 model, or a Llama model if digits are merged: with a Qwen2 model transformers
    splits all numbers into digits.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    tokenizer = make_merging_tokenizer() if recipe.merged else make_tokenizer()
    config = (LlamaConfig if recipe.merged else Qwen2Config)(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.width * 8 // 3,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.width // 32,
        num_key_value_heads=recipe.width // 32,
        max_position_embeddings=128,
        # With these two settings models learn quickly on short sequences.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.06,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    (LlamaForCausalLM if recipe.merged else Qwen2ForCausalLM)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_optimizer(parameters: list[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """Return AdamW, or Muon for the layers' matrices with AdamW for all other parameters."""
    betas = (0.9, 0.99)
    if not recipe.muon:
        return torch.optim.AdamW(parameters, lr=recipe.lr, betas=betas, weight_decay=0.0)
    # Embedding and head are matrices too, but have only one row per symbol.
    matrices = [p for p in parameters if p.ndim == 2 and min(p.shape) > len(SYMBOLS) + 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in chosen]
    return Chained(
        torch.optim.Muon(matrices, lr=recipe.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=recipe.lr, betas=betas, weight_decay=0.0),
    )


class Chained(torch.optim.Optimizer):
    """Combines optimizers over disjoint parameters into one, with their parameter groups."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        super().__init__([p for part in parts for g in part.param_groups for p in g["params"]], {})
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: Any = None) -> Any:
        """Evaluate the closure once, step every optimizer, and return the loss."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss
