"""The embedded teacher and student: small Qwen2 models, trained on first use and cached."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kdrl_lightning.errors import ConfigurationError, require_between
from kdrl_lightning.models import ModelSource
from kdrl_lightning.tiny.addition import SYMBOLS, AdditionTraces
from kdrl_lightning.tiny.cache import cached_folder


@dataclass(frozen=True)
class Recipe:
    """Shape of a model and its supervised training.

    Attributes:
        width: hidden size; heads are 32 wide, which vLLM's CPU kernels need.
        layers: transformer layers.
        steps: optimizer steps.
        batch_size: worked additions per step.
        lr: peak learning rate of a one-cycle schedule.
    """

    width: int
    layers: int
    steps: int
    batch_size: int
    lr: float


RECIPES = {
    "teacher": Recipe(width=128, layers=3, steps=1000, batch_size=128, lr=3e-3),
    "student": Recipe(width=96, layers=2, steps=1000, batch_size=128, lr=3e-3),
}


class TinyModel(ModelSource):
    """A model source for column addition: made from a seed on first use, then taken from the cache.

    The student has a misconception: the annotator of its training data forgets each carry with
    probability ``slip``. So the right step is in its distribution, but rarely.

    Args:
        role: ``teacher`` (correct traces) or ``student``.
        slip: strength of the student's misconception, in [0, 1]; the teacher has none.
        digits: digits of each number.
        seed: of initialisation and data.
    """

    def __init__(
        self,
        role: Literal["teacher", "student"],
        slip: float = 0.9,
        digits: int = 4,
        seed: int = 0,
    ) -> None:
        if role not in RECIPES:
            raise ConfigurationError(f"`role` must be teacher or student: got {role}.")
        require_between("slip", slip, 0.0, 1.0)
        require_between("digits", digits, 1, 9)
        require_between("seed", seed, 0, float("inf"))
        self.role = role
        self.slip = slip if role == "student" else 0.0
        self.digits = digits
        self.seed = seed

    @property
    def name(self) -> str:
        """Name in the cache; it changes with everything that the weights depend on."""
        recipe = repr((sorted(asdict(RECIPES[self.role]).items()), torch.__version__))
        key = hashlib.sha256(recipe.encode()).hexdigest()[:8]
        slip = f"-slip{self.slip:g}" if self.role == "student" else ""
        return f"addition{self.digits}-{self.role}{slip}-seed{self.seed}-{key}"

    def path(self) -> str:
        """Return the model's folder, making it if need be."""
        return str(cached_folder(self.name, self._make))

    def _make(self, folder: Path) -> None:
        from lightning.pytorch.utilities.seed import isolate_rng

        threads = torch.get_num_threads()
        with isolate_rng(), tempfile.TemporaryDirectory() as start:
            try:
                # One thread: the order of additions, and so the weights, do not depend on cores.
                torch.set_num_threads(1)
                save_untrained(RECIPES[self.role], Path(start), self.seed)
                self._train(start, folder)
            finally:
                torch.set_num_threads(threads)

    def _train(self, start: str, folder: Path) -> None:
        import lightning.pytorch as pl
        from lightning.pytorch.strategies import SingleDeviceStrategy

        from kdrl_lightning.callbacks.progress import RolloutProgress
        from kdrl_lightning.module import KDRLModule
        from kdrl_lightning.objectives import SFT
        from kdrl_lightning.supervised import SupervisedDataModule

        recipe, began = RECIPES[self.role], time.perf_counter()

        def schedule(optimizer: torch.optim.Optimizer) -> Any:
            return torch.optim.lr_scheduler.OneCycleLR(
                optimizer, recipe.lr, recipe.steps, pct_start=0.1, cycle_momentum=False
            )

        module = KDRLModule(
            student=start,
            objective=SFT(),
            optimizer=lambda p: torch.optim.AdamW(p, lr=recipe.lr, weight_decay=0.0),
            lr_scheduler=schedule,
        )
        traces = AdditionTraces(
            recipe.steps * recipe.batch_size, self.seed, self.digits, self.slip
        )
        logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
        trainer = pl.Trainer(
            strategy=SingleDeviceStrategy("cpu"),
            max_steps=recipe.steps,
            gradient_clip_val=1.0,
            callbacks=[RolloutProgress(f"making the embedded {self.role}")],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=SupervisedDataModule(traces, recipe.batch_size, self.seed))
        module.export(str(folder))
        print(f"embedded {self.role} made in {time.perf_counter() - began:.0f} s: {self.name}")


def save_untrained(recipe: Recipe, folder: Path, seed: int) -> None:
    """Write a randomly initialised Qwen2 model and its tokenizer as a Hugging Face folder."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=4 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.width // 32,
        num_key_value_heads=recipe.width // 32,
        max_position_embeddings=128,
        # Short sequences: these two make the models learn quickly.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.06,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer() -> Any:
    """One token a character, plus padding and end."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *SYMBOLS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
