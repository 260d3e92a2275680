"""Makes teacher and student for Knights and Knaves: small Llama models, trained on first use.

The student is a smaller model that has seen few worked puzzles: it knows the form of an answer, and
evaluates simple statements. We have planted no error in it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.knights.task import KnightsTraces, make_tokenizer
from kdrl_lightning import __version__
from kdrl_lightning.errors import ConfigurationError, require_count
from kdrl_lightning.models.folder_cache import cached_folder
from kdrl_lightning.models.loading import ModelSource
from kdrl_lightning.tiny.training import repeatable, train_on_traces, warmed_up

# Seeds of the training puzzles start here, apart from those of the configurations.
TRACES_SEED = 1000
# Raise it if puzzles, traces or parts change, so that models are trained again.
TRACES_VERSION = 2


@dataclass(frozen=True)
class Recipe:
    """Shape of a model and its supervised training.

    Attributes:
        width: hidden size; heads are 32 wide.
        layers: transformer layers.
        steps: optimizer steps; the rate rises over the first tenth and then falls to 0.
        batch_size: worked puzzles per step, each seen once.
        lr: peak learning rate.
    """

    width: int
    layers: int
    steps: int
    batch_size: int
    lr: float


RECIPES = {
    "teacher": Recipe(width=128, layers=4, steps=600, batch_size=48, lr=4e-3),
    "student": Recipe(width=96, layers=3, steps=220, batch_size=48, lr=4e-3),
}


class KnightsModel(ModelSource):
    """A model source for Knights and Knaves: trains the model on first use, then caches it.

    Args:
        role: ``teacher`` or ``student``.
        depth: deepest nesting of a statement in its training puzzles.
        seed: seed of initialisation and data.
        steps: optimizer steps in place of the recipe's; more make a stronger student.
    """

    def __init__(
        self,
        role: Literal["teacher", "student"],
        depth: int = 2,
        seed: int = 0,
        steps: int | None = None,
    ) -> None:
        if role not in RECIPES:
            raise ConfigurationError(f"`role` must be teacher or student: got {role}.")
        require_count("depth", depth, 2, float("inf"))
        require_count("seed", seed, 0, float("inf"))
        recipe = RECIPES[role]
        self.role = role
        self.depth = depth
        self.seed = seed
        self.steps = recipe.steps if steps is None else steps
        require_count("steps", self.steps, 10, float("inf"))

    @property
    def name(self) -> str:
        """Return the name in the cache, which depends on recipe, traces and library versions."""
        from importlib.metadata import version

        versions = f"{__version__}-rg{version('reasoning-gym')}-torch{torch.__version__}"
        made_from = repr((RECIPES[self.role], TRACES_VERSION))
        key = hashlib.sha256(made_from.encode()).hexdigest()[:8]
        own = f"depth{self.depth}-steps{self.steps}-seed{self.seed}"
        return f"knights-{self.role}-{own}-{key}-{versions}"

    def path(self) -> str:
        """Return the model's folder; the model is trained if it does not exist."""
        return str(cached_folder(self.name, self.train))

    def train(self, folder: Path) -> None:
        """Train the model from its seed into ``folder``, without any cache."""
        recipe, steps, began = RECIPES[self.role], self.steps, time.perf_counter()
        traces = KnightsTraces(steps * recipe.batch_size, TRACES_SEED + self.seed, self.depth)
        with repeatable() as start:
            save_untrained(recipe, Path(start), self.seed)
            train_on_traces(
                start,
                traces,
                str(folder),
                optimizer=lambda p: MuonAndAdamW(p, recipe.lr),
                rate=warmed_up(steps),
                steps=steps,
                batch_size=recipe.batch_size,
                name=f"knights {self.role}",
                seed=self.seed,
            )
        print(
            f"knights {self.role} made in {time.perf_counter() - began:.0f} s from {len(traces)} "
            f"puzzles ({traces.dropped} of the validation part left out)"
        )


def save_untrained(recipe: Recipe, folder: Path, seed: int) -> None:
    """Write a randomly initialised Llama model and its tokenizer as a Hugging Face folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.width * 8 // 3,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.width // 32,
        num_key_value_heads=recipe.width // 32,
        max_position_embeddings=256,
        # For short sequences, these two make the models learn quickly.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.06,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class MuonAndAdamW(torch.optim.Optimizer):
    """Combines Muon on the layers' matrices with AdamW on embedding, head and norms."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        every = list(parameters)
        super().__init__(every, {})
        words = len(make_tokenizer())
        matrices = [p for p in every if p.ndim == 2 and words not in p.shape]
        chosen = {id(p) for p in matrices}
        rest = [p for p in every if id(p) not in chosen]
        muon: Any = torch.optim.Muon
        self.parts = (
            muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.0),
        )
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> Any:
        """Evaluate the closure once, then let each part take its step."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss
