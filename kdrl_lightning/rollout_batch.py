"""``RolloutBatch``: completions on their way from the engine, through scoring, to the objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdrl_lightning.common.layout import LAYOUT_FIELDS, Layout

STUDENT, TEACHER = 0, 1


@dataclass(frozen=True)
class StepTotals:
    """Counts over one optimizer step: all micro-batches of all ranks.

    Reductions divide by these, so that a loss does not depend on how the step is split into
    micro-batches.

    Attributes:
        num_loss_tokens: tokens in the loss.
        num_imitated_tokens: loss tokens on which the teacher is imitated.
        num_completions: completions with at least one loss token.
        num_prompts: prompts with at least one loss token.
        max_tokens: the token limit of a completion.
        imitation_weight: sum of ``imitation_weights`` over the imitated tokens; 0 without weights.
    """

    num_loss_tokens: float
    num_imitated_tokens: float
    num_completions: float
    num_prompts: float
    max_tokens: int
    imitation_weight: float = 0.0

    def __add__(self, other: StepTotals) -> StepTotals:
        """Add the counts of two disjoint parts of a step."""
        return StepTotals(
            self.num_loss_tokens + other.num_loss_tokens,
            self.num_imitated_tokens + other.num_imitated_tokens,
            self.num_completions + other.num_completions,
            self.num_prompts + other.num_prompts,
            max(self.max_tokens, other.max_tokens),
            self.imitation_weight + other.imitation_weight,
        )


@dataclass(frozen=True)
class RolloutBatch:
    """B completions with their masks, rewards, scores and advantages.

    A row of ``input_ids`` is ``prompt + completion + padding``. ``completion_ids`` repeats the
    completion's tokens from column 0 on, and every ``[B, T]`` field is aligned to it: column t
    belongs to ``completion_ids[:, t]``. Log-probabilities and entropies after its end are 0.

    Example: prompt ``1+2=`` (4 tokens), completion ``3<eos>``, one padding column::

        input_ids       1 + 2 = 3 <eos> <pad>
        prompt_lengths  4
        completion_ids  3 <eos> <pad>
        completion_mask 1 1     0

    Attributes:
        input_ids: ``[B, S]`` int64, padded on the right.
        prompt_lengths: ``[B]`` int64, tokens of the prompt.
        completion_ids: ``[B, T]`` int64, the sampled tokens, with the end token.
        completion_mask: ``[B, T]`` bool: True on sampled tokens.
        loss_mask: ``[B, T]`` bool: ``completion_mask``, False in completions outside of the loss.
        group_ids: ``[B]`` int64, one number for all completions of a prompt.
        group_tokens: ``[B]``, loss tokens of the completion's whole group.
        rewards: ``[B]``, the composite reward; float64 in a float64 run, else float32.
        correct: ``[B]`` bool: the verifier accepts the completion.
        truncated: ``[B]`` bool: the completion was cut at the token limit.
        policy_version: ``[B]`` int64, optimizer step of the weights that sampled the completion.
        temperature: sampling temperature; all log-probabilities are taken at it.
        engine_exact: the engine's log-probabilities of the student equal the trainer's by
            construction.
        source: ``[B]`` int64, who sampled the completion: ``STUDENT`` or ``TEACHER``.
        teacher_route: ``[B]`` int64, index of the teacher that scores the completion.
        teacher_prompt_ids: ``[B, W]`` int64, the prompt after which the teacher reads the
            completion, -1 after its end; rows of a group may differ. None: the student's.
        has_context: ``[B]`` bool: the teacher's own prompt has a context for the completion. A row
            without one is not imitated. None: every row has what its teacher needs.
        teacher_ends: ``[B]`` int64, the teacher's end token, -1 if it is the student's. None: it is
            the student's in all rows.
        rollout_logprobs: ``[B, T]``, the behavior log-probabilities, as the engine that sampled the
            row reported them: the teacher's in rows of the teacher.
        old_logprobs: ``[B, T]``, the student's at rollout time, recomputed by the trainer. None:
            take those of the update's forward pass, detached; this holds for the next two fields
            too.
        old_entropy: ``[B, T]`` nats, the student's at rollout time.
        topk_ids: ``[B, T, K]`` int64, the student's most likely tokens at rollout time.
        teacher_logprobs: ``[B, T]``, the frozen teacher's. None if there is no teacher, or if the
            update runs it for a divergence; this holds for the next two fields too.
            With ``chunk_places``: the sum of the teacher's log-probabilities over the chunk.
        chunk_places: ``[B, T]`` int64, how many tokens of its chunk precede a token, if the
            teacher has another tokenizer; -1 on tokens that it cannot score. None: each token is a
            chunk. ``losses/teacher_chunks.py`` computes with it.
        teacher_entropy: ``[B, T]`` nats.
        teacher_top_ids: ``[B, T]`` int64, the teacher's most likely token.
        teacher_topk_ids: ``[B, T, K]`` int64, the teacher's most likely tokens, best first; None:
            the objective does not need them.
        teacher_topk_logprobs: ``[B, T, K]``, the teacher's at ``teacher_topk_ids``; without these,
            at ``topk_ids``.
        teacher_tail_logprobs: ``[B, T]``, the teacher's for all other tokens taken together.
        ref_logprobs: ``[B, T]``, the reference's: by default the student's before training.
        importance_weights: ``[B, T]``, weights that correct for the sampling engine.
        advantages: ``[B]`` or ``[B, T]``.
        imitation_mask: ``[B, T]`` bool: True on tokens on which the teacher is imitated.
        imitation_weights: ``[B, T]``, weights of the imitated tokens before they are normalised
            over the optimizer step; None: all are 1.
        totals: counts of the optimizer step that this batch belongs to.
        metrics: measurements of the rollout (seconds, tokens), only in its first micro-batch; None
            for a metric that only an earlier rollout measured.
        host_layout: tokens and lengths on the CPU, if the batch was moved from there to a GPU.
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
    teacher_prompt_ids: Tensor | None = None
    has_context: Tensor | None = None
    teacher_ends: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    old_entropy: Tensor | None = None
    topk_ids: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    chunk_places: Tensor | None = None
    teacher_entropy: Tensor | None = None
    teacher_top_ids: Tensor | None = None
    teacher_topk_ids: Tensor | None = None
    teacher_topk_logprobs: Tensor | None = None
    teacher_tail_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    importance_weights: Tensor | None = None
    advantages: Tensor | None = None
    imitation_mask: Tensor | None = None
    imitation_weights: Tensor | None = None
    totals: StepTotals | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    host_layout: Layout | None = None

    def __len__(self) -> int:
        """Return B, the number of completions."""
        return self.input_ids.shape[0]

    @property
    def completion_lengths(self) -> Tensor:
        """Number of sampled tokens of each completion, ``[B]`` int64."""
        return self.completion_mask.sum(1)

    @cached_property
    def student_mask(self) -> Tensor:
        """Loss tokens that the student sampled, ``[B, T]`` bool."""
        return self.loss_mask & (self.source == STUDENT)[:, None]

    @cached_property
    def taught_mask(self) -> Tensor:
        """Loss tokens of completions that the teacher may be imitated on, ``[B, T]`` bool.

        These are all loss tokens except those of rows without a context.
        """
        if self.has_context is None:
            return self.loss_mask
        return self.loss_mask & self.has_context[:, None]

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of prompt and completion together, ``[B]`` int64."""
        return self.prompt_lengths + self.completion_lengths

    @cached_property
    def layout(self) -> Layout:
        """Tokens and lengths on the CPU; without ``host_layout`` the host waits for a GPU once."""
        if self.host_layout is not None:
            return self.host_layout
        return Layout(**{name: getattr(self, name) for name in LAYOUT_FIELDS}).on_cpu()

    def with_layout(self, layout: Layout) -> RolloutBatch:
        """Return a copy that takes this for its layout; on a CPU its own tables are the layout."""
        return replace(self, host_layout=None if self.input_ids.device.type == "cpu" else layout)

    # `Any`: fields have many types, and `dataclasses.replace` takes them as `Any`.
    def replace(self, **changes: Any) -> RolloutBatch:
        """Return a copy with the given fields changed."""
        if LAYOUT_FIELDS & changes.keys():
            changes = {"host_layout": None, **changes}
        return replace(self, **changes)

    def completed(self, found: Mapping[str, Tensor | None]) -> RolloutBatch:
        """Return a copy in which ``found`` fills the fields that are None; others stay.

        Args:
            found: values by field name, from an update's forward passes over these completions.
        """
        return self.replace(**{n: v for n, v in found.items() if getattr(self, n) is None})

    def to(self, device: torch.device | str) -> RolloutBatch:
        """Return a copy with its tensors on ``device``."""
        moved = self._map(lambda t: upload(t, torch.device(device)))
        return moved.with_layout(self.layout) if self.input_ids.device.type == "cpu" else moved

    def select(self, rows: Tensor | Sequence[int]) -> RolloutBatch:
        """Return the given rows, trimmed to the longest row and completion among them.

        ``totals``, ``metrics`` and other fields without tensors stay as they are.
        """
        index = torch.as_tensor(rows, dtype=torch.long).cpu()
        places = upload(index, self.input_ids.device)
        picked = self._map(lambda t: t[places])
        if not len(picked):
            return picked
        sizes = self.layout.sizes
        width, tokens, longest = (max(sizes[r][i] for r in index.tolist()) for i in range(3))
        tokens = max(tokens, 1)
        cut = {"input_ids": picked.input_ids[:, :width]}
        if picked.teacher_prompt_ids is not None:
            cut["teacher_prompt_ids"] = picked.teacher_prompt_ids[:, :longest]
        for item in fields(picked):
            value = getattr(picked, item.name)
            if isinstance(value, Tensor) and value.dim() >= 2 and item.name not in cut:
                cut[item.name] = value[:, :tokens]
        layout = self.layout.select(index, width, tokens, longest)
        return replace(picked, **cut).with_layout(layout)  # type: ignore[arg-type]

    def without_flat_groups(self) -> RolloutBatch:
        """Return a copy in which groups with equal rewards are left out of the loss."""
        flat = flat_groups(self.rewards, self.group_ids)[self.group_ids]
        return self.replace(
            loss_mask=self.loss_mask & ~flat[:, None], group_tokens=self.group_tokens * ~flat
        )

    def count(self, max_tokens: int) -> StepTotals:
        """Return the counts that this batch adds to the totals of its step.

        Args:
            max_tokens: the token limit of a completion.
        """
        used = self.loss_mask.any(1)
        imitated = self.loss_mask
        if self.imitation_mask is not None:
            imitated = imitated & self.imitation_mask
        weights = self.imitation_weights
        return StepTotals(
            num_loss_tokens=float(self.loss_mask.sum()),
            num_imitated_tokens=float(imitated.sum()),
            num_completions=float(used.sum()),
            num_prompts=float(self.group_ids[used].unique().numel()),
            max_tokens=max_tokens,
            imitation_weight=0.0 if weights is None else float(weights[imitated].double().sum()),
        )

    def _map(self, function: Callable[[Tensor], Tensor]) -> RolloutBatch:
        changed = {
            item.name: function(value)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return self.replace(**changed)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; the host does not wait for a copy from CPU to GPU."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        # Fake tensors, and those of a simulated GPU, cannot be pinned.
        pins = type(tensor) is Tensor and torch.cuda.is_available()
        return (tensor.pin_memory() if pins else tensor).to(device, non_blocking=True)
    return tensor.to(device)


def reward_dtype() -> torch.dtype:
    """Return the type of rewards: float64 if it is torch's default type, else float32."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def flat_groups(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Return the groups in which all rewards are equal, so that their advantages are 0.

    We compare rewards in the type that they have in the batch: 0.1 + 0.2 and 0.3 are equal in
    float32 and differ in float64.

    Args:
        rewards: ``[B]`` one reward per completion.
        group_ids: ``[B]`` int64, group numbers from 0 to P - 1, each with a completion.

    Returns:
        ``[P]`` bool: True if the rewards of the group are equal.

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
    """Return sequences of different length as one ``[B, T]``, padded on the right with ``value``.

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
    """Return a batch built from token lists, with one entry per completion.

    Set fields that hold for all completions (``temperature``, ``engine_exact``) with ``replace``.

    Args:
        prompts: B lists of token ids.
        completions: B lists of token ids; the end token, if sampled, is part of them.
        group_ids: B group numbers.
        pad_id: padding token after the end of a row; it is in no mask.
        rewards: B rewards, kept in ``reward_dtype()``; None: zeros.
        correct: B decisions of the verifier; None: False.
        truncated: B flags: the completion was cut at the token limit; None: False.
        policy_version: B counts of optimizer steps; None: zeros.
        rollout_logprobs: B lists aligned with ``completions``.
        source: B times ``STUDENT`` or ``TEACHER``; None: the student.
        teacher_route: B indices of teachers; None: zeros.
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
