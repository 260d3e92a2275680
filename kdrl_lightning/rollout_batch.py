"""The one structure that travels: from the engine, through scoring, to the objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

STUDENT, TEACHER = 0, 1


@dataclass(frozen=True)
class StepTotals:
    """Counts over one optimizer step: all micro-batches of all ranks.

    Reductions divide by these, so that a loss does not depend on how the step was cut.
    """

    num_loss_tokens: float
    num_imitated_tokens: float
    num_completions: float
    num_prompts: float
    max_tokens: int

    def __add__(self, other: StepTotals) -> StepTotals:
        """Add the counts of two disjoint parts of a step."""
        return StepTotals(
            self.num_loss_tokens + other.num_loss_tokens,
            self.num_imitated_tokens + other.num_imitated_tokens,
            self.num_completions + other.num_completions,
            self.num_prompts + other.num_prompts,
            max(self.max_tokens, other.max_tokens),
        )


@dataclass(frozen=True)
class RolloutBatch:
    """B completions with everything that is known about them.

    Rows are ``prompt + completion + padding`` in ``input_ids``; the completion's tokens stand once
    more, shifted to column 0, in ``completion_ids``, and every ``[B, T]`` field is aligned to them:
    column t speaks of ``completion_ids[:, t]``. Values behind a completion's end are 0.

    Example: prompt ``1+2=`` (4 tokens), completion ``3<eos>``, one padding column::

        input_ids       1 + 2 = 3 <eos> <pad>
        prompt_lengths  4
        completion_ids  3 <eos> <pad>
        completion_mask 1 1     0

    Attributes:
        input_ids: ``[B, S]`` int64, padded on the right.
        prompt_lengths: ``[B]`` int64, tokens of the prompt.
        completion_ids: ``[B, T]`` int64, the tokens that were sampled (the end token counts).
        completion_mask: ``[B, T]`` bool, a fact about the data: True on sampled tokens.
        loss_mask: ``[B, T]`` bool: ``completion_mask`` less the completions left out of the loss.
        group_ids: ``[B]`` int64; completions of one prompt share it.
        group_tokens: ``[B]``, loss tokens of the completion's whole group.
        rewards: ``[B]``, the composite reward; float64 in a float64 run, else float32.
        correct: ``[B]`` bool, the verifier's own answer.
        truncated: ``[B]`` bool, cut at the token limit.
        policy_version: ``[B]`` int64, optimizer steps that the sampling weights had seen.
        temperature: sampling temperature; all log-probabilities are taken at it.
        engine_exact: the student's ``rollout_logprobs`` are the trainer's own, by construction.
        source: ``[B]`` int64, who sampled the completion: ``STUDENT`` or ``TEACHER``.
        teacher_route: ``[B]`` int64, which of several teachers scores it.
        rollout_logprobs: ``[B, T]``, what the engine that sampled the row reported: the behavior
            log-probabilities, the teacher's on its own rows.
        old_logprobs: ``[B, T]``, student at rollout time, recomputed by the trainer. None: those of
            the update's own forward pass, detached; the same holds for the two fields below.
        old_entropy: ``[B, T]`` nats, the student's at rollout time.
        topk_ids: ``[B, T, K]`` int64, the student's most likely tokens at rollout time.
        teacher_logprobs: ``[B, T]``, the frozen teacher's. None if there is no teacher, or if the
            update runs it for a divergence; the same holds for the two fields below.
        teacher_entropy: ``[B, T]`` nats.
        teacher_top_ids: ``[B, T]`` int64, the teacher's most likely token.
        teacher_topk_logprobs: ``[B, T, K]``, the teacher's at ``topk_ids``.
        teacher_tail_logprobs: ``[B, T]``, of all other tokens together.
        ref_logprobs: ``[B, T]``, the initial student's.
        importance_weights: ``[B, T]``, correction of the sampling engine.
        advantages: ``[B]`` or ``[B, T]``.
        imitation_mask: ``[B, T]`` bool, a decision: where the teacher's term applies.
        totals: counts of the optimizer step that this batch belongs to.
        metrics: measurements of the rollout (seconds, tokens); on its first micro-batch only.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    loss_mask: Tensor
    group_ids: Tensor
    group_tokens: Tensor
    rewards: Tensor
    correct: Tensor
    truncated: Tensor
    policy_version: Tensor
    source: Tensor
    teacher_route: Tensor
    temperature: float = 1.0
    engine_exact: bool = True
    rollout_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    old_entropy: Tensor | None = None
    topk_ids: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    teacher_entropy: Tensor | None = None
    teacher_top_ids: Tensor | None = None
    teacher_topk_logprobs: Tensor | None = None
    teacher_tail_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    importance_weights: Tensor | None = None
    advantages: Tensor | None = None
    imitation_mask: Tensor | None = None
    totals: StepTotals | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return B, the number of completions."""
        return self.input_ids.shape[0]

    @property
    def completion_lengths(self) -> Tensor:
        """``[B]`` int64: sampled tokens of each completion."""
        return self.completion_mask.sum(1)

    @cached_property
    def student_mask(self) -> Tensor:
        """``[B, T]`` bool: loss tokens that the student sampled."""
        return self.loss_mask & (self.source == STUDENT)[:, None]

    @property
    def lengths(self) -> Tensor:
        """``[B]`` int64: tokens of prompt and completion together."""
        return self.prompt_lengths + self.completion_lengths

    def replace(self, **changes: Any) -> RolloutBatch:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def completed(self, found: Mapping[str, Tensor | None]) -> RolloutBatch:
        """Return a copy in which ``found`` fills fields that are None; others stay.

        Args:
            found: by field name, what the forward passes of an update said of these completions.
        """
        return self.replace(**{n: v for n, v in found.items() if getattr(self, n) is None})

    def to(self, device: torch.device | str) -> RolloutBatch:
        """Return a copy whose tensors lie on ``device``."""
        return self._map(lambda t: t.to(device))

    def select(self, rows: Tensor | Sequence[int]) -> RolloutBatch:
        """Return the given rows, trimmed to their own longest row and completion.

        Only tensors are selected: ``totals`` and ``metrics`` stay as they are.
        """
        index = torch.as_tensor(rows, dtype=torch.long, device=self.input_ids.device)
        picked = self._map(lambda t: t[index])
        if not len(picked):
            return picked
        width = int(picked.lengths.max())
        tokens = max(int(picked.completion_lengths.max()), 1)
        cut = {"input_ids": picked.input_ids[:, :width]}
        for item in fields(picked):
            value = getattr(picked, item.name)
            if isinstance(value, Tensor) and value.dim() >= 2 and item.name != "input_ids":
                cut[item.name] = value[:, :tokens]
        return replace(picked, **cut)  # type: ignore[arg-type]

    def count(self, max_tokens: int) -> StepTotals:
        """Count what this batch adds to the totals of its step."""
        used = self.loss_mask.any(1)
        imitated = self.loss_mask if self.imitation_mask is None else self.imitation_mask
        return StepTotals(
            num_loss_tokens=float(self.loss_mask.sum()),
            num_imitated_tokens=float((imitated & self.loss_mask).sum()),
            num_completions=float(used.sum()),
            num_prompts=float(self.group_ids[used].unique().numel()),
            max_tokens=max_tokens,
        )

    def _map(self, function: Any) -> RolloutBatch:
        changed = {
            item.name: function(value)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **changed)


def reward_dtype() -> torch.dtype:
    """Type of rewards: float64 if that is torch's default type, as in a float64 run."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def flat_groups(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Whether all rewards of a group are equal: it gets no advantage, and is worth a refill.

    Rewards are compared in the type that they have in the batch: 0.1 + 0.2 and 0.3 are equal in
    float32 and differ in float64.

    Args:
        rewards: ``[B]``.
        group_ids: ``[B]`` int64, groups from 0 to P - 1, each with a completion.

    Returns:
        ``[P]`` bool.

    >>> flat_groups(torch.tensor([0.1 + 0.2, 0.3, 1.0, 0.0]), torch.tensor([0, 0, 1, 1]))
    tensor([ True, False])
    """
    size = int(group_ids.max()) + 1 if len(group_ids) else 0
    low = rewards.new_full((size,), torch.inf).scatter_reduce(0, group_ids, rewards, "amin")
    high = rewards.new_full((size,), -torch.inf).scatter_reduce(0, group_ids, rewards, "amax")
    return low == high


def pad_rows(
    rows: Sequence[Sequence[float] | Sequence[int]], value: float, dtype: torch.dtype
) -> Tensor:
    """Stack sequences of different length into ``[B, T]``, padded on the right.

    >>> pad_rows([[1, 2], [3]], 0, torch.long).tolist()
    [[1, 2], [3, 0]]
    """
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    inside = np.arange(max(lengths.max(initial=0), 1)) < lengths[:, None]
    out = torch.full(inside.shape, value, dtype=dtype)
    flat = list(chain.from_iterable(rows))
    if flat:
        out[torch.from_numpy(inside)] = torch.tensor(flat, dtype=dtype)
    return out


def collate(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    group_ids: Sequence[int],
    *,
    pad_id: int,
    rewards: Sequence[float] | None = None,
    correct: Sequence[bool] | None = None,
    truncated: Sequence[bool] | None = None,
    policy_version: Sequence[int] | None = None,
    rollout_logprobs: Sequence[Sequence[float]] | None = None,
    source: Sequence[int] | None = None,
    teacher_route: Sequence[int] | None = None,
    mask_truncated: bool = False,
) -> RolloutBatch:
    """Build a batch from token lists, one entry per completion.

    What holds for all of them (``temperature``, ``engine_exact``) is set by ``replace``.

    Args:
        prompts: B prompts.
        completions: B completions; their end token, if sampled, is part of them.
        group_ids: B group numbers.
        pad_id: token written behind the end (masked everywhere).
        rewards: B rewards, kept in ``reward_dtype()``; zeros if None.
        correct: B verifier answers; False if None.
        truncated: B flags; False if None.
        policy_version: B versions; zeros if None.
        rollout_logprobs: B lists aligned with ``completions``.
        source: B of ``STUDENT`` or ``TEACHER``; the student if None.
        teacher_route: B indices of teachers; zeros if None.
        mask_truncated: leave truncated completions out of the loss.
    """
    size = len(prompts)
    mask = pad_rows([[1] * len(c) for c in completions], 0, torch.long).bool()
    cut = torch.tensor(truncated if truncated is not None else [False] * size, dtype=torch.bool)
    loss_mask = mask & ~cut[:, None] if mask_truncated else mask
    groups = torch.tensor(group_ids, dtype=torch.long)
    group_tokens = torch.zeros(int(groups.max()) + 1 if size else 1, dtype=torch.float32)
    group_tokens.index_add_(0, groups, loss_mask.sum(1).float())
    return RolloutBatch(
        input_ids=pad_rows(
            [[*p, *c] for p, c in zip(prompts, completions, strict=True)], pad_id, torch.long
        ),
        prompt_lengths=torch.tensor([len(p) for p in prompts], dtype=torch.long),
        completion_ids=pad_rows(completions, pad_id, torch.long),
        completion_mask=mask,
        loss_mask=loss_mask,
        group_ids=groups,
        group_tokens=group_tokens[groups],
        rewards=torch.tensor(
            rewards if rewards is not None else [0.0] * size, dtype=reward_dtype()
        ),
        correct=torch.tensor(correct if correct is not None else [False] * size, dtype=torch.bool),
        truncated=cut,
        policy_version=torch.tensor(
            policy_version if policy_version is not None else [0] * size, dtype=torch.long
        ),
        source=torch.tensor(source if source is not None else [STUDENT] * size, dtype=torch.long),
        teacher_route=torch.tensor(
            teacher_route if teacher_route is not None else [0] * size, dtype=torch.long
        ),
        rollout_logprobs=None
        if rollout_logprobs is None
        else pad_rows(rollout_logprobs, 0.0, torch.float32),
    )
