"""Given completions over several processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdrl_lightning import ConfigurationError, SupervisedDataModule
from kdrl_lightning.end_tokens import EndTokens
from kdrl_lightning.models import load_tokenizer

TRACES = [{"prompt": f"{i}+1=", "completion": "1" * (i + 1)} for i in range(8)]


def attach(data: SupervisedDataModule, tokenizer: Any, rank: int, size: int, longest: float) -> Any:
    def reduce(value: torch.Tensor, operation: str) -> torch.Tensor:
        return value * size if operation == "sum" else torch.tensor(longest)

    module = SimpleNamespace(
        tokenizer=tokenizer,
        end_tokens=EndTokens((tokenizer.eos_token_id,)),
        reduce=reduce,
        device=torch.device("cpu"),
        objective=None,
    )
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=module,
        global_rank=rank,
        global_step=0,
        world_size=size,
        accumulate_grad_batches=2,
        limit_val_batches=1.0,
    )
    return data


@pytest.mark.parametrize(("batch_size", "ranks"), [(7, 2), (2, 2), (1, 1)])
def test_a_batch_without_a_part_for_each_rank_is_refused(batch_size, ranks, student_folder):
    data = SupervisedDataModule(TRACES, batch_size)
    attach(data, load_tokenizer(student_folder), 0, ranks, 0.0)
    words = rf"`batch_size` must be a multiple of the {ranks} processes, with .*: got {batch_size}"
    with pytest.raises(ConfigurationError, match=words):
        data.setup("fit")


def test_ranks_agree_on_the_longest_completion(student_folder):
    tokenizer = load_tokenizer(student_folder)
    parts = []
    for rank in range(2):
        data = attach(SupervisedDataModule(TRACES, 8), tokenizer, rank, 2, 9.0)
        data.setup("fit")
        parts.append([data.on_after_batch_transfer(i, 0) for i in range(2)])
    rows = [part.completion_lengths.tolist() for rank in parts for part in rank]
    assert sorted(n for row in rows for n in row) == list(range(2, 10))
    assert {part.totals.max_tokens for rank in parts for part in rank} == {9}
