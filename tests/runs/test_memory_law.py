"""No pass, forward or backward, of any model makes a tensor of tokens times vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.qwen2 import save_qwen2
from helpers.short_runs import make_data, make_trainer
from kdrl_lightning import GKD, GRPO, KDRL, RLAD, KDRLModule, LocalTeacher
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.objectives import Objective

# A random model stops late and is rarely right.
pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")

VOCAB, WIDTH, CHUNK = 3001, 32, 16


class Probe(TorchDispatchMode):
    """Remembers the most rows of a table with a column per token of the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and WIDTH not in value.shape:  # heads, embeddings
                self.rows = max(self.rows, value.numel() // VOCAB)
        return out


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory, student_folder: str) -> str:
    """A model whose vocabulary is far larger than anything else of it."""
    folder = tmp_path_factory.mktemp("wide")
    save_qwen2(
        folder,
        student_folder,
        VOCAB,
        WIDTH,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return str(folder)


@pytest.mark.parametrize(
    "objective",
    [
        GRPO(ref_kl_coef=0.1, entropy_coef=0.01),
        RLAD(),
        KDRL(kl_estimator="top_k", kd_top_k=4),
        GKD(),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_a_step_has_one_chunk_of_logits_at_a_time(
    tmp_path: Path, wide_folder: str, objective: Objective
) -> None:
    probe = Probe()

    class Watch(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            for name in ("score", "score_reference", "score_teacher", "training_step", "backward"):
                inner = getattr(pl_module, name)

                def watched(*args: Any, inner: Any = inner, **kwargs: Any) -> Any:
                    with probe:
                        return inner(*args, **kwargs)

                setattr(pl_module, name, watched)

    module = KDRLModule(
        student=wide_folder,
        teacher=LocalTeacher(wide_folder, chunk_size=CHUNK),
        objective=objective,
        chunk_size=CHUNK,
    )
    data = make_data(minibatches_per_rollout=1)  # 16 completions of at most 10 tokens
    make_trainer(tmp_path, max_steps=1, callbacks=[Watch()]).fit(module, datamodule=data)
    assert probe.rows == CHUNK


@pytest.mark.parametrize("make", [LocalTeacher, lambda x, **k: KDRLModule(x, GRPO(), **k)])
def test_a_chunk_has_a_row(make: Any, wide_folder: str) -> None:
    with pytest.raises(ConfigurationError, match=r"`chunk_size` must be at least 1: got 0"):
        make(wide_folder, chunk_size=0)
