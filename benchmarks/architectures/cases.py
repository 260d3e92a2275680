"""Tries one small random model for the table of architectures, with a function per column.

A case returns ``yes``, ``—`` if it does not apply, or raises: a ``ConfigurationError`` is a refusal
and anything else a failure. A difference in log-probabilities is always a failure.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.architectures import families
from kdrl_lightning.engines import Sampling, TransformersEngine
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import build_causal_lm, load_causal_lm
from kdrl_lightning.models.lora import LoRA
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import Sharding, load_scorer
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rollout_batch import RolloutBatch, collate

BOUND = 1e-3
NOT = "—"
SHAPES = [(5, 3), (1, 19), (17, 1), (12, 20), (12, 9), (12, 13)]  # prompt, completion


class WrongError(AssertionError):
    """Raised if log-probabilities differ."""


def make_rows() -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(2, 90, (p + c,), generator=draw).tolist() for p, c in SHAPES]
    rows[4][:12] = rows[5][:12] = rows[3][:12]  # the last three share their prompt
    return rows


def make_batch(rows: list[list[int]]) -> RolloutBatch:
    prompts = [row[:p] for row, (p, _) in zip(rows, SHAPES, strict=True)]
    completions = [row[p:] for row, (p, _) in zip(rows, SHAPES, strict=True)]
    return collate(prompts, completions, [0, 1, 2, 3, 3, 3], pad_id=0)


@torch.no_grad()
# `Any`: transformers has no type that all models share.
def alone(model: Any, row: list[int], prompt: int) -> torch.Tensor:
    """Return log-probabilities of a completion from the model's logits, with its row alone."""
    logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, prompt - 1 : -1]
    chosen = torch.tensor(row[prompt:])[:, None]
    return logits.log_softmax(-1).gather(-1, chosen).squeeze(-1)


def compare(name: str, found: torch.Tensor, wanted: torch.Tensor, bound: float = BOUND) -> None:
    gap = float((found - wanted).abs().max())
    if not gap <= bound:
        raise WrongError(f"{name}: {gap:.2g} apart")


@torch.no_grad()
def compare_scores(name: str, scorer: Scorer, model: Any) -> None:
    rows = make_rows()
    scores = scorer(*call(make_batch(rows))).logprobs
    for row, (prompt, count), found in zip(rows, SHAPES, scores, strict=True):
        compare(name, found[:count], alone(model, row, prompt))


def call(batch: RolloutBatch) -> tuple[torch.Tensor, ...]:
    return batch.input_ids, batch.prompt_lengths, batch.completion_ids, batch.completion_mask


def loads(folder: Path) -> str:
    load_scorer(str(folder), torch.float32)
    return "yes"


def logprobs(folder: Path) -> str:
    scorer = load_scorer(str(folder), torch.float32)
    reference = load_causal_lm(str(folder))
    compare_attention(scorer.model, reference)
    scorer.shares = False
    compare_scores("scores", scorer, reference)
    return "yes"


def compare_attention(model: Any, reference: Any) -> None:
    """Give the reference transformers' eager attention, or the scorer's if it has none."""
    try:
        reference.set_attn_implementation("eager")
    except ValueError:
        reference.set_attn_implementation(model.config._attn_implementation)


def shared(folder: Path) -> str:
    scorer = load_scorer(str(folder), torch.float32)
    if not scorer.shares:
        return NOT
    compare_scores("shared prompts", scorer, scorer.model)
    return "yes"


def sampling(folder: Path) -> str:
    scorer = load_scorer(str(folder), torch.float32)
    engine, weights = TransformersEngine(), ModelWeights(scorer.model, str(folder))
    engine.setup(weights, 1, 0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        engine.update_weights(weights, 0)
    rows = make_rows()
    prompts = [row[:p] for row, (p, _) in zip(rows, SHAPES, strict=True)][:4]
    groups = engine.generate(prompts, [[7 * i, 7 * i + 1] for i in range(4)], Sampling(20))
    for prompt, group in zip(prompts, groups, strict=True):
        for one in group:
            wanted = alone(scorer.model, prompt + one.ids, len(prompt))
            compare("sampling", torch.tensor(one.logprobs), wanted)
    slow = any("without a cache" in str(each.message) for each in said)
    return "yes, without a cache" if slow else "yes"


def lora(folder: Path) -> str:
    """Check that a step changes the log-probabilities, and that merged weights give the same."""
    scorer = load_scorer(str(folder), torch.float32, lora=LoRA(rank=2, alpha=4.0))
    rows = make_rows()
    inputs = call(make_batch(rows))
    before = scorer(*inputs).logprobs
    trained = [p for p in scorer.parameters() if p.requires_grad]
    before.sum().backward()
    torch.optim.SGD(trained, lr=0.05).step()
    scorer.zero_grad()
    scorer(*inputs).logprobs.sum().backward()
    torch.optim.SGD(trained, lr=0.05).step()
    with torch.no_grad():
        after = scorer(*inputs).logprobs
    if not (after - before).abs().max() > 1e-4:
        raise WrongError("a step with adapters changes nothing")
    merged = load_causal_lm(str(folder))
    merged.set_attn_implementation(scorer.model.config._attn_implementation)
    merged.load_state_dict(ModelWeights(scorer.model, str(folder)).state(), strict=False)
    compare_scores("merged adapters", scorer, merged)
    return "yes"


def fsdp2(folder: Path) -> str:
    from torch.distributed.device_mesh import init_device_mesh

    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    sharding = Sharding(init_device_mesh("cpu", (1,)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scorer = load_scorer(str(folder), torch.float32, sharding)
    reference = load_causal_lm(str(folder))
    reference.set_attn_implementation(scorer.model.config._attn_implementation)
    compare_scores("sharded", scorer, reference)
    scorer(*call(make_batch(make_rows()))).logprobs.sum().backward()
    return "yes"


def export(folder: Path) -> str:
    """Check that a changed model can be exported, from its folder and from a checkpoint."""
    scorer = load_scorer(str(folder), torch.float32)
    model = scorer.model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    weights = ModelWeights(model, str(folder))
    weights.save(str(folder / "exported"))
    again = load_causal_lm(str(folder / "exported"))
    again.set_attn_implementation(model.config._attn_implementation)
    compare_scores("exported", scorer, again)
    config = model.config.to_json_string(use_diff=False)
    resumed = build_causal_lm(config, model.generation_config.to_json_string(), weights.state())
    resumed.save_pretrained(folder / "resumed")
    again = load_causal_lm(str(folder / "resumed"))
    again.set_attn_implementation(model.config._attn_implementation)
    compare_scores("resumed", scorer, again)
    return "yes"


COLUMNS: dict[str, Callable[[Path], str]] = {
    "loads": loads,
    "log-probs": logprobs,
    "shared prompts": shared,
    "sampling": sampling,
    "LoRA": lora,
    "fsdp2": fsdp2,
    "export and resume": export,
}


def cell(column: str, folder: Path) -> str:
    """Return a cell of the table."""
    try:
        return COLUMNS[column](folder)
    except ConfigurationError as error:
        return "refused: " + str(error).replace(f"{folder}/", "").replace(str(folder), "MODEL")
    except Exception as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        return f"failed: {type(error).__name__}: {reason}".replace(str(folder), "MODEL")


def row(model_type: str, folder: Path, columns: list[str]) -> dict[str, str]:
    """Return a row of the table; a model that is refused at loading has no other cells."""
    families.save(model_type, folder)
    first = cell("loads", folder)
    rest = {c: cell(c, folder) if first == "yes" else NOT for c in columns if c != "loads"}
    return {"loads": first, **rest}
