"""Every method with a teacher of another tokenizer: a chunk is one action."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.objective_steps import TAUGHT, ready, step, student
from helpers.reference import close
from kdrl_lightning.losses.teacher_chunks import chunk_sizes, chunk_totals
from kdrl_lightning.objectives import (
    GRPO,
    KDRL,
    RLAD,
    SCOPE,
    Advantage,
    Gates,
    OnPolicyDistillation,
    PolicyObjective,
    ShapedAdvantage,
    TokenRatio,
    TokenScores,
)
from kdrl_lightning.rollout_batch import RolloutBatch, pad_rows

SAMPLED = sorted(
    name
    for name, make in TAUGHT.items()
    if not ((made := make()).top_k or made.teacher_top_k) and made.divergence is None
)
# These read completions' lengths, or each token's own weight.
BY_LENGTH = {"kdrl-shaping", "kdrl-per-token", "kdrl-truncated", "scope"}
PLACES = [[0, 1, 0, 1, 2], [0, 0, 1, 0, 0], [0, 1, 2, 0, 0], [0, 1, 0, 0, 1]]


def cut(batch: RolloutBatch) -> Tensor:
    """Chunks of one to three tokens; a completion's end closes the last one."""
    rows = torch.tensor([PLACES[i % 4] for i in range(len(batch))])
    return rows[:, : batch.completion_ids.shape[1]] * batch.completion_mask


def chunked(seed: int = 0) -> RolloutBatch:
    batch = step(seed, mixed=False)
    places = cut(batch)
    return batch.replace(
        chunk_places=places, teacher_logprobs=chunk_totals(batch.teacher_logprobs, places)
    )


def merged(batch: RolloutBatch, values: Tensor) -> Tensor:
    """``[B, C]`` sums of a ``[B, T]`` table over the chunks, keeping the graph."""
    first = (batch.chunk_places == 0) & batch.completion_mask
    totals = chunk_totals(values * batch.completion_mask, batch.chunk_places)
    rows = [totals[i][first[i]] for i in range(len(first))]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def of_chunks(batch: RolloutBatch) -> RolloutBatch:
    """The same rollout of a student whose tokens are the chunks."""
    first = (batch.chunk_places == 0) & batch.completion_mask
    mask = pad_rows([[1] * int(n) for n in first.sum(1)], 0, torch.long).bool()
    tables = {
        name: merged(batch, value)
        for name in ("old_logprobs", "rollout_logprobs", "ref_logprobs")
        if (value := getattr(batch, name)) is not None
    }
    teacher = [batch.teacher_logprobs[i][first[i]] for i in range(len(first))]  # type: ignore[index]
    return batch.replace(
        **tables,
        teacher_logprobs=torch.nn.utils.rnn.pad_sequence(teacher, batch_first=True),
        chunk_places=None,
        completion_mask=mask,
        loss_mask=mask & batch.loss_mask[:, :1],
        completion_ids=mask.long(),
        old_entropy=torch.zeros(mask.shape, dtype=torch.float64),
        topk_ids=None,
        teacher_topk_logprobs=None,
    )


@pytest.mark.parametrize("name", SAMPLED)
def test_chunks_of_one_token_are_the_plain_teacher(name: str) -> None:
    """Bit for bit: loss, its terms and every gradient."""
    plain, scores = step(), student(step())
    got = []
    for batch in plain, plain.replace(chunk_places=torch.zeros_like(plain.completion_ids)):
        objective = TAUGHT[name]()
        loss, terms = objective(ready(objective, batch), scores)
        (gradient,) = torch.autograd.grad(loss, scores.logprobs, retain_graph=True)
        got.append((loss.detach(), gradient, terms))
    assert torch.equal(got[0][0], got[1][0]) and torch.equal(got[0][1], got[1][1])
    assert all(torch.equal(got[0][2][n], got[1][2][n]) for n in got[0][2])


@pytest.mark.parametrize("name", sorted(set(SAMPLED) - BY_LENGTH))
def test_a_chunk_is_one_action(name: str) -> None:
    """At rho = 1 each token of a chunk gets the gradient of a student with one token for it."""
    objective: Any = TAUGHT[name](reduction="constant_length")
    batch = chunked()
    logprobs = batch.old_logprobs.clone().requires_grad_()  # type: ignore[union-attr]
    loss, _ = objective(ready(objective, batch), TokenScores(logprobs, None))
    (each,) = torch.autograd.grad(loss, logprobs)

    actions = of_chunks(batch)
    whole = merged(batch, batch.old_logprobs).requires_grad_()  # type: ignore[arg-type]
    loss, _ = objective(ready(objective, actions), TokenScores(whole, None))
    (expected,) = torch.autograd.grad(loss, whole)
    numbers = ((batch.chunk_places == 0) & batch.completion_mask).cumsum(1) - 1
    spread = expected.gather(1, numbers.clamp(min=0)) * batch.completion_mask
    assert each.abs().max() > 1e-3
    close(each, spread)


@pytest.mark.parametrize("estimator", ["k2", "k3", "policy_gradient"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_kl_of_chunks_is_weighted_by_their_ratio(estimator: str, weighted: bool) -> None:
    """Away from rho = 1 too, the loss and its gradient are those of one token per chunk."""
    objective = OnPolicyDistillation(
        0.7, weighted, estimator, reduction="constant_length", engine_correction=None
    )
    batch = chunked()
    logprobs = student(batch).logprobs
    loss, _ = objective(ready(objective, batch), TokenScores(logprobs, None))
    (each,) = torch.autograd.grad(loss, logprobs)
    whole = merged(batch, logprobs.detach()).requires_grad_()
    other, _ = objective(ready(objective, of_chunks(batch)), TokenScores(whole, None))
    (expected,) = torch.autograd.grad(other, whole)
    numbers = ((batch.chunk_places == 0) & batch.completion_mask).cumsum(1) - 1
    close(each, expected.gather(1, numbers.clamp(min=0)) * batch.completion_mask)
    if estimator != "policy_gradient":  # whose value means nothing
        close(loss, other)


def test_the_clamp_acts_on_the_offset_of_a_chunk() -> None:
    batch = chunked()
    old, places = batch.old_logprobs, batch.chunk_places
    offset = chunk_totals(old, places) - batch.teacher_logprobs  # type: ignore[arg-type]
    for clamp in ({"offset_clamp": 0.4}, {"log_ratio_clamp": 0.4}):
        objective = RLAD(trrd_alpha=0.25, **clamp)  # type: ignore[arg-type]
        ratio = objective.log_ratio(ready(objective, batch), old)  # type: ignore[arg-type]
        close(ratio[batch.loss_mask], 0.75 * offset.clamp(-0.4, 0.4)[batch.loss_mask])
        (part,) = [p for p in objective.parts() if hasattr(p, "clamped")]
        far = part.clamped(ready(objective, batch), old)  # type: ignore[union-attr]
        assert torch.equal(far, (offset.abs() > 0.4) & batch.loss_mask)


def test_a_shaped_reward_counts_a_chunk_once() -> None:
    """A completion's mean gap is its whole gap divided by the student's tokens."""
    batch = chunked()
    rule = ShapedAdvantage(0.3)
    objective = PolicyObjective(TokenRatio(), rule)
    got = ready(objective, batch).advantages
    gap = (batch.teacher_logprobs - chunk_totals(batch.old_logprobs, batch.chunk_places)) * (  # type: ignore[operator, arg-type]
        batch.loss_mask & (batch.chunk_places == 0)  # type: ignore[operator]
    )
    mean = gap.sum(1) / batch.loss_mask.sum(1).clamp(min=1)
    plain = batch.replace(
        chunk_places=None,
        teacher_logprobs=batch.old_logprobs + mean[:, None],  # type: ignore[operator]
    )
    close(got, ready(objective, plain).advantages)


def test_a_mean_of_the_teachers_log_probs_counts_a_chunk_once() -> None:
    """SCOPE's weights are those of a teacher that spreads the sum of a chunk over its tokens."""
    batch = chunked()
    sizes = chunk_sizes(batch.chunk_places)  # type: ignore[arg-type]
    spread = batch.replace(chunk_places=None, teacher_logprobs=batch.teacher_logprobs / sizes)  # type: ignore[operator]
    weights = [ready(SCOPE(), b).advantages for b in (batch, spread)]
    close(*weights)
    raw = ready(SCOPE(), batch.replace(chunk_places=None)).advantages
    assert not torch.allclose(weights[0], raw)  # type: ignore[arg-type]


def test_tokens_without_a_score_are_not_imitated() -> None:
    """Their policy gradient stays GRPO's, whatever stands in their teacher's column."""
    batch = chunked()
    places = batch.chunk_places.clone()  # type: ignore[union-attr]
    places[0], places[2, 3:] = -1, -1
    teacher = batch.teacher_logprobs.masked_fill(places < 0, -9.0)  # type: ignore[union-attr]
    batch = batch.replace(chunk_places=places, teacher_logprobs=teacher)
    scores = student(batch)
    for name in SAMPLED:
        objective = TAUGHT[name]()
        made = ready(objective, batch)
        assert not (made.imitation_mask & (places < 0)).any()
        other = batch.replace(teacher_logprobs=teacher.masked_fill(places < 0, -0.5))
        results = [objective(ready(objective, b), scores)[0] for b in (batch, other)]
        assert torch.equal(*results), name
    _, terms = KDRL(0.3)(ready(KDRL(0.3), batch), scores)
    close(terms["policy"], GRPO()(ready(GRPO(), batch), scores)[0])


def test_a_chunk_is_imitated_whole_or_not_at_all() -> None:
    batch = chunked()
    entropy = torch.zeros_like(batch.old_logprobs)  # type: ignore[arg-type]
    entropy[2, 4] = entropy[0, 1] = 9.0
    objective = KDRL(selection=[Gates(exploration_entropy=1.0)])
    mask = ready(objective, batch.replace(old_entropy=entropy)).imitation_mask
    assert mask[0, :3].tolist() == [False, False, True]  # type: ignore[index]
    assert mask[2].tolist() == [True, True, True, True, False]  # type: ignore[index]


@pytest.mark.parametrize("per", ["token", "completion"])
def test_the_alignment_gate_reads_gaps_of_chunks(per: Any) -> None:
    batch = chunked()
    places, old = batch.chunk_places, batch.old_logprobs
    gap = (batch.teacher_logprobs - chunk_totals(old, places)).abs()  # type: ignore[operator, arg-type]
    if per == "completion":
        once = gap / chunk_sizes(places) * batch.loss_mask  # type: ignore[arg-type]
        gap = (once.sum(1) / batch.loss_mask.sum(1).clamp(min=1))[:, None].expand_as(gap)
    objective = KDRL(selection=[Gates(alignment_threshold=0.5, alignment_per=per)])
    mask = ready(objective, batch).imitation_mask
    assert torch.equal(mask, (gap <= 0.5) & batch.loss_mask)  # type: ignore[arg-type]
    assert 0 < int(mask.sum()) < int(batch.loss_mask.sum())  # type: ignore[union-attr]


def test_the_teacher_is_read_in_one_place() -> None:
    """``teacher_logprobs`` of base.py: the field of the batch holds sums of chunks."""
    folder = Path(inspect.getfile(PolicyObjective)).parent
    for path in set(folder.glob("*.py")) - {folder / "base.py"}:
        assert not re.search(r"(batch|rollout)\.teacher_logprobs", path.read_text()), path.name


def test_advantages_from_rewards_ignore_chunks() -> None:
    batch = chunked()
    objective = PolicyObjective(TokenRatio(), Advantage())
    scores = student(batch)
    plain = batch.replace(chunk_places=None)
    close(*(objective(ready(objective, b), scores)[0] for b in (batch, plain)))
