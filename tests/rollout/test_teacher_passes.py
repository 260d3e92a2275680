"""A teacher that reads more tokens than the student stays within the token limit of a pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.one_rank import alone
from kdrl_lightning.rollout.updates import Cut, Waits, plan_updates, resume_updates
from kdrl_lightning.rollout.updates.partition import teacher_passes
from kdrl_lightning.rollout_batch import RolloutBatch, collate
from kdrl_lightning.teachers.own_prompt.groups import OwnPrompt, with_prompts

OWN = [3, 9, 2, 7, 30, 4]  # tokens that the teacher reads of each row


def fake(aligns: bool = False, collective: bool = False, own: list[int] = OWN) -> Any:
    """A teacher that notes when it is asked for lengths; row ``i`` has a completion ``[i]``."""

    def lengths(batch: RolloutBatch) -> Tensor:
        teacher.events.append(("lengths", batch.completion_ids[:, 0].tolist()))
        return torch.tensor([own[i] for i in batch.completion_ids[:, 0].tolist()])

    teacher = SimpleNamespace(aligns=aligns, collective=collective, lengths=lengths, events=[])
    return teacher


def rollout() -> RolloutBatch:
    batch = collate([[9]] * 6, [[i] for i in range(6)], [0, 0, 0, 1, 1, 1], pad_id=0)
    return with_prompts(batch, [OwnPrompt([i + 1] * (n - 1)) for i, n in enumerate(OWN)])


def test_passes_keep_the_limit_or_have_one_row() -> None:
    parts = [[0, 1, 2], [3, 4, 5]]
    passes = list(teacher_passes(parts, rollout(), fake(), 10, alone))
    assert passes == [[2, 0], [1], [5], [3], [4]]
    for teacher, limit in (None, 10), (fake(), float("inf")), (fake(), 1000):
        assert [sorted(p) for p in teacher_passes(parts, rollout(), teacher, limit, alone)] == parts


def test_ranks_that_score_together_have_equally_many_passes() -> None:
    most = lambda value, how: value + 2  # noqa: E731  another rank needs two passes more
    passes = list(teacher_passes([[0, 2]], rollout(), fake(collective=True), 10, most))
    assert passes == [[2, 0], [0], [0]]


@pytest.mark.parametrize("aligns", [False, True])
def test_the_limit_holds_for_new_and_resumed_rollouts(aligns: bool) -> None:
    """An aligning teacher is asked for the lengths of a part only after the part before it."""
    teacher = fake(aligns)

    def score(part: RolloutBatch) -> RolloutBatch:
        rows = part.completion_ids[:, 0].tolist()
        teacher.events.append(("score", rows))
        assert len(rows) == 1 or len(rows) * max(OWN[i] for i in rows) <= 10
        return part.replace(teacher_logprobs=-part.completion_ids.double())

    same = lambda batch: batch  # noqa: E731
    scoring: Any = SimpleNamespace(
        score=same, score_reference=same, score_teacher=score, prepare=same, reduce=alone
    )
    cut = Cut(1, 1, 2, 8, max_micro_tokens=10, teacher=teacher)
    plan = plan_updates(rollout(), 0, cut, scoring, Waits())
    assert plan.batch.teacher_logprobs[:, 0].tolist() == [-i for i in range(6)]  # type: ignore[index]
    first = [kind for kind, _ in teacher.events].index("score")
    assert first == (1 if aligns else 2)
    teacher.events.clear()
    again = resume_updates(plan.batch.replace(teacher_logprobs=None), 0, cut, scoring, Waits())
    assert torch.equal(again.batch.teacher_logprobs, plan.batch.teacher_logprobs)  # type: ignore[arg-type]
    assert len(teacher.events) > 4
