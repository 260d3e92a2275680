"""Refills: groups with equal rewards are sampled again from other prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kdrl_lightning.rollout.generation import Judged
from kdrl_lightning.rollout_batch import flat_groups, reward_dtype


def fill_groups(
    slots: Sequence[int],
    sample: Callable[[list[int], int], list[list[Judged]]],
    max_refills: int,
) -> tuple[list[list[Judged]], list[list[Judged]]]:
    """Return a sampled group per slot, and refill groups with equal rewards from other prompts.

    This is DAPO's dynamic sampling (arXiv 2503.14476): a group without variance gives no policy
    gradient. A group that is still flat after the last refill stays. We compare rewards in the type
    of the batch, so that a group is replaced if and only if its advantages would be 0.

    Args:
        slots: slots to fill.
        sample: ``(slots, attempt) -> groups``, one per slot.
        max_refills: attempts after the first.

    Returns:
        The groups in the order of the slots, and those that were replaced.
    """
    filled: dict[int, list[Judged]] = {}
    replaced: list[list[Judged]] = []
    flat = list(slots)
    for attempt in range(max_refills + 1):
        filled.update(zip(flat, sample(flat, attempt), strict=True))
        flat = [s for s in flat if _is_flat(filled[s])]
        if not flat or attempt == max_refills:
            break
        replaced += [filled[s] for s in flat]
    return [filled[s] for s in slots], replaced


def _is_flat(group: Sequence[Judged]) -> bool:
    rewards = torch.tensor([j.verdict.reward for j in group], dtype=reward_dtype())
    return bool(flat_groups(rewards, torch.zeros(len(group), dtype=torch.long)).all())
