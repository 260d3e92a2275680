"""A whole optimizer step of student and teacher completions, and every preset of the family."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from helpers.reference import close, f64, normal
from kdrl_lightning.objectives import (
    CISPO,
    EOPD,
    GKD,
    GOPD,
    GRPO,
    GSPO,
    KDRL,
    OPSD,
    RLAD,
    RLSD,
    SCOPE,
    SDAR,
    SDFT,
    SDPO,
    SFT,
    SRPO,
    BehaviorRatio,
    GapAdvantage,
    Objective,
    OnPolicyDistillation,
    PolicyObjective,
    PublishedSRPO,
    SampledKL,
    Selection,
    ShapedProbability,
    SumAdvantage,
    SurrogateTerm,
    TokenRatio,
    TokenScores,
    TruncatedImportance,
    TrustRegionRatio,
    WrongCompletions,
    WrongGroups,
)
from kdrl_lightning.rollout_batch import RolloutBatch, collate

REDUCTIONS: list[Any] = ["token_mean", "sequence_mean", "constant_length", "group_token_mean"]
V, K, PAD, MAX_TOKENS = 6, 3, 0, 9
GROUPS = [0] * 4 + [2] * 4 + [1] * 4 + [5] * 4
COMPLETIONS = [
    *([1, 2, 3], [4], [2, 2, 1, 3, 4], [5, 1]),
    *([1, 1], [3, 4, 1, 2], [1], [5, 5, 2]),
    *([2, 3], [4, 4, 4], [1, 3], [1]),
    *([3, 1, 2], [2, 4], [4, 1, 1, 1], [2, 5, 3]),
]
# Four groups: mixed, all wrong, all correct, and mixed with half of it truncated.
CORRECT = [True, False, False, True] + [False] * 4 + [True] * 4 + [True, False, False, True]
REWARDS = [1.0, 0.0, 0.2, 1.1, 0.0, 0.3, 0.1, 0.4, 1.0, 1.4, 1.1, 1.2, 1.0, 0.0, 0.5, 1.0]
CUT = [i in (6, 12, 14) for i in range(16)]
THEIRS = [i % 4 == 3 for i in range(16)]
# Rows in an order that splits groups; of eight parts the first has no loss tokens.
ORDER = [12, 14, 3, 0, 6, 2, 15, 1, 5, 4, 9, 11, 8, 13, 7, 10]
TABLES = ("old_logprobs", "teacher_logprobs", "rollout_logprobs", "ref_logprobs", "old_entropy")
TEACHER_TABLES = ("teacher_logprobs", "teacher_entropy", "teacher_topk_logprobs")


def step(seed: int = 0, mixed: bool = True, wide: float = 1.0) -> RolloutBatch:
    """Return a scored float64 rollout, not prepared yet; ``wide`` scales the teacher's distance."""
    batch = collate(
        [[1 + g % 3, 2] if g else [3] for g in GROUPS],
        COMPLETIONS,
        GROUPS,
        pad_id=PAD,
        rewards=REWARDS,
        correct=CORRECT,
        truncated=CUT,
        source=[int(mixed and x) for x in THEIRS],
        mask_truncated=True,
    )
    shape, mask = batch.completion_ids.shape, batch.completion_mask
    old = (-normal(*shape, seed=seed).abs() - 0.1) * mask
    ids = normal(*shape, V, seed=seed + 20).argsort(-1)[..., :K]
    topk = normal(*shape, V, seed=seed + 21).log_softmax(-1).gather(-1, ids)
    return batch.replace(
        rewards=f64(REWARDS),
        old_logprobs=old,
        teacher_logprobs=(old + normal(*shape, seed=seed + 1, scale=wide)) * mask,
        rollout_logprobs=(old + normal(*shape, seed=seed + 2, scale=0.6)) * mask,
        ref_logprobs=(old + normal(*shape, seed=seed + 3, scale=0.5)) * mask,
        old_entropy=normal(*shape, seed=seed + 4).abs() * mask,
        topk_ids=ids,
        teacher_entropy=normal(*shape, seed=seed + 5).abs() * mask,
        teacher_topk_ids=normal(*shape, V, seed=seed + 22).argsort(-1)[..., :K],
        teacher_topk_logprobs=topk * mask[..., None],
    )


def ready(objective: Objective, batch: RolloutBatch) -> RolloutBatch:
    """Return the step prepared and with its totals, as the trainer does it."""
    batch = objective.prepare(batch)
    return batch.replace(totals=batch.count(MAX_TOKENS))


def student(batch: RolloutBatch, seed: int = 50, near: float = 0.3) -> TokenScores:
    """Return leaf tensors: log-probs near the old ones, entropies, top-k log-probs, divergences."""
    shape = batch.completion_ids.shape
    logprobs = batch.old_logprobs + normal(*shape, seed=seed, scale=near)
    rows = normal(*shape, V, seed=seed + 2).log_softmax(-1)
    return TokenScores(
        logprobs.requires_grad_(),
        normal(*shape, seed=seed + 1).abs().requires_grad_(),
        None,
        rows.gather(-1, batch.topk_ids).requires_grad_(),
        normal(*shape, seed=seed + 3).abs().requires_grad_(),
    )


def graded(
    objective: Objective, batch: RolloutBatch, scores: TokenScores
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a prepared batch, and its gradient by every tensor of ``student``."""
    loss, _ = objective(batch, scores)
    leaves = {n: x for n, x in scores._asdict().items() if x is not None and x.requires_grad}
    gradients = torch.autograd.grad(loss, leaves.values(), allow_unused=True)
    pairs = zip(leaves.items(), gradients, strict=True)
    return loss.detach(), {n: torch.zeros_like(x) if g is None else g for (n, x), g in pairs}


def bigram(objective: Objective, batch: RolloutBatch, table: Tensor) -> TokenScores:
    """Score with a bigram model: row ``previous token`` of the table has the next one's logits."""
    places = batch.prompt_lengths[:, None] - 1 + torch.arange(batch.completion_ids.shape[1])
    previous = batch.input_ids.gather(1, places.clamp(max=batch.input_ids.shape[1] - 1))
    logits, theirs = table[previous], normal(V, V, seed=13)[previous]
    rows = logits.log_softmax(-1)
    return TokenScores(
        rows.gather(-1, batch.completion_ids[..., None])[..., 0],
        -(rows.exp() * rows).sum(-1),
        None,
        rows.gather(-1, batch.teacher_topk_ids if objective.teacher_top_k else batch.topk_ids),
        None if objective.divergence is None else objective.divergence(logits, theirs),
    )


def table_gradient(
    objective: Objective,
    batch: RolloutBatch,
    cut: Sequence[Sequence[int]],
    scores: Callable[[Objective, RolloutBatch, Tensor], TokenScores] = bigram,
) -> tuple[float, Tensor]:
    """Return loss and gradient by the model's table, summed over a step's micro-batches."""
    table = normal(V, V, seed=11).requires_grad_()
    total = 0.0
    for rows in cut:
        part = batch.select(rows)
        loss, _ = objective(part, scores(objective, part, table))
        loss.backward()
        total += loss.item()
    assert table.grad is not None
    return total, table.grad


class Keep(Selection):
    """Selects the tokens of a given mask."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def __call__(self, rollout: RolloutBatch) -> Tensor:
        return self.mask


def keep(objective: Objective, mask: Tensor) -> Objective:
    """Imitate within ``mask`` only."""
    if isinstance(objective, PolicyObjective):
        objective.selection = (*objective.selection, Keep(mask))
    return objective


def some_mask(batch: RolloutBatch) -> Tensor:
    """Return a random mask with no token of one completion and all of another."""
    mask = normal(*batch.loss_mask.shape, seed=77) > 0
    mask[0], mask[2] = False, True
    return mask


def widen(batch: RolloutBatch, width: int, fill: float = 0.0) -> RolloutBatch:
    """Add columns of padding; float tables get ``fill``."""
    changes = {}
    for name, value in vars(batch).items():
        if isinstance(value, Tensor) and value.dim() >= 2:
            number = fill if value.is_floating_point() else 0
            sides = (0, width) if value.dim() == 2 else (0, 0, 0, width)
            changes[name] = torch.nn.functional.pad(value, sides, value=number)
    return batch.replace(**changes)


def same(a: Objective, b: Objective, batch: RolloutBatch, near: float = 0.3) -> None:
    """Check that two objectives give a step the same loss and gradient."""
    scores = student(batch, near=near)
    got, expected = (graded(o, ready(o, batch), scores) for o in (a, b))
    close(got[0], expected[0])
    close(got[1]["logprobs"], expected[1]["logprobs"])


def shifted(make: Callable[..., Objective], *args: Any, **fixed: Any) -> Callable[..., Objective]:
    """Return a constructor with other defaults for some arguments."""
    return lambda **kw: make(*args, **fixed, **kw)


# Presets without a teacher, then those with one, by name.
PLAIN: dict[str, Callable[..., Objective]] = {
    "grpo": GRPO,
    "grpo-dual": shifted(GRPO, dual_clip=1.3),
    "dr-grpo": shifted(GRPO, scale_by_std=False),
    "dapo": shifted(GRPO, clip_high=0.28),
    "gspo": shifted(GSPO, clip_low=0.1, clip_high=0.15),
    "cispo": CISPO,
    "luffy": shifted(GRPO, teacher_tokens=ShapedProbability()),
    "behavior": shifted(GRPO, teacher_tokens=BehaviorRatio()),
    "reference": shifted(GRPO, ref_kl_coef=0.2),
    "truncated": shifted(GRPO, engine_correction=TruncatedImportance(1.2)),
    "sft": SFT,
    "sft-correct": shifted(SFT, True),
}
TAUGHT: dict[str, Callable[..., Objective]] = {
    "kdrl": shifted(KDRL, 0.3),
    "kdrl-weighted": shifted(KDRL, 0.3, True),
    "kdrl-k3": shifted(KDRL, 0.3, kl_estimator="k3"),
    "kdrl-pg": shifted(KDRL, 0.3, kl_estimator="policy_gradient"),
    "kdrl-full": shifted(KDRL, 0.3, kl_estimator="full_vocabulary"),
    "kdrl-topk": shifted(KDRL, 0.3, kl_estimator="top_k", kd_top_k=K),
    "kdrl-advantage": shifted(KDRL, 0.3, form="advantage"),
    "kdrl-shaping": shifted(KDRL, 0.3, form="reward_shaping"),
    "kdrl-response": shifted(KDRL, 0.3, selection=[WrongCompletions()]),
    "kdrl-group": shifted(KDRL, 0.3, selection=[WrongGroups()]),
    "kdrl-per-token": shifted(KDRL, 0.3, kd_per_imitated_token=True),
    "kdrl-truncated": shifted(KDRL, 0.3, engine_correction=TruncatedImportance(1.2)),
    "hdpo": shifted(PolicyObjective, TokenRatio(), SumAdvantage(0.3), selection=[WrongGroups()]),
    "opd": shifted(OnPolicyDistillation, 0.7),
    "opd-gap": shifted(PolicyObjective, TokenRatio(), GapAdvantage()),
    "srpo": SRPO,
    "rlsd": RLSD,
    "rlad": RLAD,
    "rlad-offset": shifted(RLAD, offset_clamp=1.0),
    "rlad-dual": shifted(RLAD, dual_clip=1.3),
    "gkd": GKD,
    "gkd-topk": shifted(GKD, top_k=K),
    "sdar": shifted(SDAR, 0.3),
    "gopd": shifted(GOPD, 1.5),
    "eopd": shifted(EOPD, 0.5, K),
    "opsd": shifted(OPSD, 0.05),
    "sdpo": shifted(SDPO, top_k=K),
    "sdpo-hybrid": shifted(SDPO, 0.9, top_k=K),
    "sdft": shifted(SDFT, 1),
    "srpo-published": shifted(PublishedSRPO, top_k=K),
    "scope": SCOPE,
    "grpo+rlad": shifted(GRPO, distill=SurrogateTerm(TrustRegionRatio(), 2.0), rl_coef=0.5),
    "grpo+opd": shifted(GRPO, distill=SampledKL(0.28)),
}
PRESETS = PLAIN | TAUGHT


def make(name: str, **policy: Any) -> Any:
    """Build a preset anew: a test may change an objective's parts."""
    return copy.deepcopy(PRESETS[name](**policy))
