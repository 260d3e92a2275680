"""Counts the operations of a rollout's scoring and updates, ours and TRL's, against those needed.

Nothing is timed, and no model has weights: the code of training runs on fake tensors, with one and
with two layers, and the count of all layers follows from the two, because layers are equal. Some
micro-batches are counted; the operations of the others follow from them, because they are a sum of
the tokens, the squares of attention and the tokens at the head (``terms_of``). The fit is exact, or
the program stops.

A completion with its prompt needs 2 operations per weight of the layers and token, 2 per weight of
the head and completion token, and the lower half of attention's squares. With the backward pass it
needs three times that (attention 3.5 times, as its kernels rebuild the squares), and the forward
pass once more if layers are recomputed. Padding needs nothing.

    python benchmarks/flops.py --out docs/plan
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdrl_lightning import GRPO, KDRLModule
from kdrl_lightning.hardware.planning.job import Job
from kdrl_lightning.hardware.planning.rehearsal.building import rehearse
from kdrl_lightning.hardware.planning.rehearsal.meter import without_numbers
from kdrl_lightning.hardware.planning.rehearsal.models import allot, weightless
from kdrl_lightning.hardware.planning.rehearsal.steps import Rehearsal
from kdrl_lightning.hardware.planning.shapes import config_of, shipped
from kdrl_lightning.models.passes.shared_prompts import WidthClass
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.rollout.settings import RolloutSettings
from kdrl_lightning.rollout.updates import Cut
from kdrl_lightning.rollout_batch import RolloutBatch, collate

PROMPTS, GROUP = 128, 8
SHORTEST, LONGEST, MEDIAN, SPREAD = 300, 8000, 1500, 0.8
PROMPT = 100, 500
CHUNK = 1 << 14  # rows of the head at a time: large, because few chunks are counted faster
MODELS = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B")
# GPUs, completions per micro-batch on average, and whether models are sharded.
SHARES = ((1, 8, False), (8, 8, False), (8, 4, True), (8, 8, True))


def lengths(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens of each prompt ``[P]`` and of its completions ``[P, G]``."""
    draw = np.random.default_rng(seed)
    prompts = draw.integers(*PROMPT, PROMPTS)
    completions = np.exp(draw.normal(np.log(MEDIAN), SPREAD, (PROMPTS, GROUP)))
    return prompts, completions.clip(SHORTEST, LONGEST).astype(int)


def batch_of(prompts: np.ndarray, completions: np.ndarray) -> RolloutBatch:
    """Return completions of these lengths."""
    draw = random.Random(0)
    rows = [(p, n) for p, group in enumerate(completions) for n in group]
    ids = [[draw.randrange(1000) for _ in range(n)] for _, n in rows]
    starts = [[draw.randrange(1000) for _ in range(n)] for n in prompts]
    return collate([starts[p] for p, _ in rows], ids, [p for p, _ in rows], pad_id=0)


def needed(config: Any, prompts: np.ndarray, completions: np.ndarray) -> dict[str, float]:
    """Return the operations that one pass forward needs, by part."""
    width, layers = config.hidden_size, config.num_hidden_layers
    heads, keys, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    layer = width * size * (2 * heads + 2 * keys) + 3 * width * config.intermediate_size
    rows = prompts[:, None] + completions
    squares = (rows * (rows + 1) / 2).sum()
    return {
        "layers": 2.0 * layer * layers * rows.sum(),
        "head": 2.0 * width * config.vocab_size * completions.sum(),
        "attention": 4.0 * heads * size * layers * squares,
    }


def trained(parts: dict[str, float], recomputed: bool) -> float:
    """Return the operations of an update that needs ``parts`` forward."""
    once = parts["layers"] + parts["attention"]
    return (
        3 * (parts["layers"] + parts["head"])
        + 3.5 * parts["attention"]
        + (once + parts["head"]) * recomputed
    )


def of_all_layers(count: Callable[[int], np.ndarray], layers: int) -> np.ndarray:
    """Return a count of a model from those of one and of two of its layers."""
    one, two = count(1), count(2)
    return one + (two - one) * (layers - 1)


def ours(name: str, data: RolloutBatch, job: Job, recomputed: bool) -> np.ndarray:
    """Return the operations of scoring and of the updates of one rank's completions."""

    def count(layers: int) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "config.json"
            file.write_text(json.dumps(shipped()[name] | {"num_hidden_layers": layers}))
            module = KDRLModule(name, GRPO(), activation_checkpointing=recomputed, chunk_size=CHUNK)
            own = replace(job, model_configs={name: str(file)})
            with rehearse(module, own) as run:
                return counted(run, data, own)

    return of_all_layers(count, shipped()[name]["num_hidden_layers"])


def micro_batches(data: RolloutBatch, job: Job) -> list[tuple[bool, RolloutBatch]]:
    """Return the micro-batches of a rollout, and whether each is scored before its update."""
    settings = job.rollout
    cut = Cut(
        settings.minibatches_per_rollout,
        1,
        job.accumulate,
        settings.max_tokens,
        settings.max_tokens_per_micro_batch or float("inf"),
    )
    # The first update's own pass gives its scores.
    return [
        (number > 0, data.select(rows))
        for number, update in enumerate(cut.updates(data))
        for rows in update
    ]


def counted(run: Rehearsal, data: RolloutBatch, job: Job) -> np.ndarray:
    """Return the operations of scoring and of updates; few micro-batches are really counted."""
    parts = micro_batches(data, job)
    terms = [terms_of(run.student, part) for _, part in parts]
    counts = fitted(terms, lambda i: one(run, parts[i][1]))
    scored = np.array([early for early, _ in parts])
    return np.array([counts[scored, 0].sum(), counts[:, 1].sum()])


def one(run: Rehearsal, part: RolloutBatch) -> np.ndarray:
    """Count the operations of a micro-batch: to score it, and to train on it."""
    part = run.filled(part)
    run.meter.restart()
    run.module.score(part)
    return np.array([run.meter.flops, run.trained_flops(part)], dtype=float)


def terms_of(scorer: Scorer, part: RolloutBatch) -> tuple[float, ...]:
    """Return the quantities of a micro-batch on which its operations depend linearly.

    These are tokens and squares of attention by kind of pass, and tokens at the head. A micro-batch
    whose prompts run once has other terms than one of whole rows.
    """
    call = part.input_ids, part.prompt_lengths, part.completion_mask
    merged, tokens = scorer._merged(*call), float(part.completion_mask.sum())
    rows, width = part.input_ids.shape if merged is None else merged.input_ids.shape
    passes = scorer._classes(call, merged) or [WidthClass(list(range(rows)), width)]
    whole, squares = sum(p.tokens for p in passes), sum(p.tokens * p.width for p in passes)
    if merged is not None:
        prompts, before = merged.prompts.shape
        after = merged.mask.shape[1] - 1
        if scorer.sharing.below * whole >= prompts * before + rows * after:
            square = prompts * before**2
            return (
                0.0,
                0.0,
                prompts * before,
                square * merged.unequal,
                square * (not merged.unequal),
                rows * after,
                rows * after * (before + after),
                tokens,
            )
    return whole, squares, 0.0, 0.0, 0.0, 0.0, 0.0, tokens


def fitted(terms: Sequence[Sequence[float]], count: Callable[[int], np.ndarray]) -> np.ndarray:
    """Return the counts of all micro-batches, fitted to those of a few.

    Args:
        terms: quantities of each micro-batch, see ``terms_of``.
        count: returns the counts of the micro-batch at an index.
    """
    table = np.array(terms, dtype=float)
    out = np.zeros((len(table), 2))
    for kind in np.unique(table > 0, axis=0):
        members = np.flatnonzero(((table > 0) == kind).all(1))
        part = table[np.ix_(members, np.flatnonzero(kind))]
        part = part / part.max(0)
        samples = members[
            np.unique(np.linspace(0, len(members) - 1, 3 + part.shape[1]).astype(int))
        ]
        found = np.stack([count(int(i)) for i in samples])
        at = np.searchsorted(members, samples)
        solved, *_ = np.linalg.lstsq(part[at], found, rcond=None)
        gap = np.abs(part[at] @ solved - found).max() / found.max()
        if gap > 1e-9:
            raise RuntimeError(f"operations are not a sum of these terms: {gap:.1e} apart")
        out[members] = part @ solved
    return out


def theirs(
    name: str, prompts: np.ndarray, completions: np.ndarray, rows: int, own_width: bool
) -> np.ndarray:
    """Return TRL's operations: old log-probabilities, and the updates, without recomputation.

    Its layers run on padded rows, its head on the tokens of completions alone.

    Args:
        name: the model.
        prompts: tokens of each prompt.
        completions: tokens of its completions.
        rows: completions of a micro-batch.
        own_width: pad each micro-batch to its own longest row, which TRL 1.16 does not: it pads to
            the longest one of all completions that it samples at once.
    """
    from trl.trainer.utils import add_fused_lm_head

    pairs = [(p, n) for p, group in zip(prompts, completions, strict=True) for n in group]
    random.Random(0).shuffle(pairs)
    parts = [pairs[i : i + rows] for i in range(0, len(pairs), rows)]
    whole = max(p for p, _ in pairs), max(n for _, n in pairs)

    def count(layers: int) -> np.ndarray:
        config = config_of(name, {})
        config.num_hidden_layers, config.layer_types = layers, config.layer_types[:layers]
        with without_numbers() as meter, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = allot(weightless(config, torch.float32))
            add_fused_lm_head(model, outputs=("log_probs", "entropy"))
            small = [(4, 64)]
            each = _passes(model, meter, small, small[0], True)
            each = (each - _passes(model, meter, small, small[0], False)) / 64
            shapes = [
                (max(p for p, _ in part), max(n for _, n in part)) if own_width else whole
                for part in parts
            ]
            terms = [(rows * (p + n), rows * (p + n) ** 2) for p, n in shapes]
            if len(set(shapes)) > 1:
                counts = fitted(terms, lambda i: _passes(model, meter, parts[i], shapes[i], False))
            else:
                counts = len(parts) * _passes(model, meter, parts[0], whole, False)[None]
        return each * completions.sum() + counts.sum(0)

    return of_all_layers(count, shipped()[name]["num_hidden_layers"])


def _passes(
    model: Any, meter: Any, part: Sequence[tuple[int, int]], shape: tuple[int, int], head: bool
) -> np.ndarray:
    """Return the operations of a pass without gradient, and of one forward and backward."""
    prompt, completion = shape
    before, after = (torch.tensor(x)[:, None] for x in zip(*part, strict=True))
    column = torch.arange(prompt + completion)
    mask = ((column >= prompt - before) & (column < prompt + after)).long()
    ids = torch.ones_like(mask)
    labels = ids.masked_fill((mask == 0) | (column < prompt), -100)
    out = []
    for grad in (False, True):
        meter.restart()
        with torch.set_grad_enabled(grad):
            if head:
                made = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
                value = made.log_probs.sum()
            else:
                value = model.model(input_ids=ids, attention_mask=mask).last_hidden_state.sum()
        if grad:
            value.backward()
        out.append(meter.flops)
    return np.array(out, dtype=float)


def compared(name: str, seed: int, ranks: int, sharded: bool, rows: int) -> dict[str, Any]:
    """Return needed and executed operations of one rank's share of a rollout."""
    prompts, completions = (x[: PROMPTS // ranks] for x in lengths(seed))
    job = Job(
        RolloutSettings(
            PROMPTS,
            GROUP,
            LONGEST,
            minibatches_per_rollout=2,
        ),
        ranks=ranks,
        strategy="fsdp2" if sharded else "ddp" if ranks > 1 else "single",
        precision="bf16-mixed",
        accumulate=PROMPTS * GROUP // ranks // 2 // rows,
        longest_prompt=PROMPT[1],
    )
    config = config_of(name, {})
    parts = needed(config, prompts, completions)
    later = needed(config, prompts[len(prompts) // 2 :], completions[len(prompts) // 2 :])
    data = batch_of(prompts, completions)
    record: dict[str, Any] = {"model": name, "ranks": ranks, "rows": rows, "sharded": sharded}
    for recomputed in (False, True):
        due = sum(later.values()) + trained(parts, recomputed)
        score, update = ours(name, data, job, recomputed)
        record["recomputed" if recomputed else "kept"] = {
            "needed": due,
            "score": score / sum(later.values()),
            "update": update / trained(parts, recomputed),
            "ratio": (score + update) / due,
        }
    due = sum(parts.values()) + trained(parts, False)
    for own_width in (False, True):
        score, update = theirs(name, prompts, completions, rows, own_width)
        record["trl, own width" if own_width else "trl"] = {
            "needed": due,
            "score": score / sum(parts.values()),
            "update": update / trained(parts, False),
            "ratio": (score + update) / due,
        }
    return record


def table(records: list[dict[str, Any]]) -> str:
    """Return the ratios as a Markdown table."""
    columns = ("kept", "recomputed", "trl", "trl, own width")
    lines = [
        "| model, GPUs, completions per micro-batch | ours | ours, layers recomputed | TRL 1.16 "
        "| TRL, if it padded each micro-batch by itself |",
        "| --- " * 5 + "|",
    ]
    for r in records:
        cells = [
            f"{r[c]['ratio']:.2f} ({r[c]['score']:.2f}, {r[c]['update']:.2f})" for c in columns
        ]
        where = f"{r['ranks']}, {r['rows']}"
        lines.append(f"| {r['model']}, {where} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    records = []
    for name in args.models:
        for ranks, rows, sharded in SHARES:
            records.append(compared(name, args.seed, ranks, sharded, rows))
            print(json.dumps(records[-1]), flush=True)
    print(table(records))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "flops.json").write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
