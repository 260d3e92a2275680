"""Self-teachers: laws of their weights and scores, and what is refused."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdrl_lightning import GKD, KDRL, AdapterOffTeacher, CachedTeacher, LoRA, RoutedTeacher
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses.logprobs import Other, TokenScores
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import load_scorer
from kdrl_lightning.rollout_batch import RolloutBatch, collate
from kdrl_lightning.teachers import (
    HardSync,
    InitialWeights,
    LiveWeights,
    MovingAverage,
    SelfTeacher,
    Teacher,
    TrustRegion,
)
from kdrl_lightning.teachers.frozen import FrozenModels, check_given
from kdrl_lightning.teachers.self_teachers import WeightRule, drop_kept
from kdrl_lightning.teachers.self_teachers.mixed_logits import mix

CPU = torch.device("cpu")
PROMPTS = [[3, 4, 12, 5, 6, 13], [5, 12, 5, 13], [3, 4, 5, 6, 12, 7, 8, 9, 10, 13]]
COMPLETIONS = [[5, 9, 1], [6], [7, 8, 2, 11, 1]]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    """Weights are float64, as under ``64-true``."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=[None, 4], ids=["full", "LoRA"])
def student(request: pytest.FixtureRequest, student_folder: str) -> Scorer:
    lora = None if request.param is None else LoRA(request.param)
    return load_scorer(student_folder, torch.float64, lora=lora)


@pytest.fixture
def whole(student_folder: str) -> Scorer:
    return load_scorer(student_folder, torch.float64)


@pytest.fixture
def batch() -> RolloutBatch:
    made = collate(PROMPTS, COMPLETIONS, [0, 1, 2], pad_id=0)
    return made.replace(temperature=0.8)


def taught(rule: WeightRule, student: Scorer, folder: str) -> SelfTeacher:
    teacher = SelfTeacher(rule)
    teacher.look_at(student, folder)
    teacher.load(CPU)
    return teacher


def move(student: Scorer, step: int) -> None:
    """Change what is trained, as an optimizer step does."""
    noise = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=noise, dtype=p.dtype), alpha=0.05)


def same(ours: TokenScores, theirs: TokenScores) -> None:
    for name, value in theirs._asdict().items():
        assert (value is None) == (getattr(ours, name) is None), name
        assert value is None or torch.equal(getattr(ours, name), value), name


def test_rates_of_0_and_1_are_the_initial_and_the_current_student(
    student: Scorer, student_folder: str, batch: RolloutBatch
) -> None:
    ids = torch.randint(0, 16, (*batch.completion_ids.shape, 3))
    still = [InitialWeights(), MovingAverage(0.0), HardSync(9), TrustRegion(0.0)]
    along = [LiveWeights(), MovingAverage(1.0), HardSync(1), TrustRegion(1.0)]

    def scored(asked: Tensor | None) -> TokenScores:
        return student.score(batch, 1, asked).map(Tensor.detach)

    first = {asked: scored(asked) for asked in (None, ids)}
    teachers = [[taught(r, student, student_folder) for r in rules] for rules in (still, along)]
    for step in range(1, 4):
        move(student, step)
        for teacher in (*teachers[0], *teachers[1]):
            teacher.follow(step)
        now = {asked: scored(asked) for asked in (None, ids)}
        assert (now[None].logprobs - first[None].logprobs).abs().max() > 1e-3
        for group, expected in zip(teachers, (first, now), strict=True):
            for teacher in group:
                for asked, wanted in expected.items():
                    same(teacher.score(batch, asked), wanted)
                states = teacher.states(batch).hidden
                assert torch.equal(states, group[0].states(batch).hidden)
                assert not states.requires_grad


def test_a_hard_sync_copies_every_n_steps(
    student: Scorer, student_folder: str, batch: RolloutBatch
) -> None:
    teacher = taught(HardSync(2), student, student_folder)
    first = teacher.score(batch)
    for step in range(1, 5):
        move(student, step)
        before = teacher.score(batch)
        teacher.follow(step)
        expected = student.score(batch, 1).map(Tensor.detach) if step % 2 == 0 else before
        same(teacher.score(batch), expected)
    assert not torch.equal(teacher.score(batch).logprobs, first.logprobs)


def test_the_average_of_a_constant_student_nears_it_by_the_old_share(
    student: Scorer, student_folder: str
) -> None:
    a, n = 0.3, 7
    teacher = taught(MovingAverage(a), student, student_folder)
    assert teacher.kept is not None
    begun = [p.clone() for p in teacher.kept.parameters()]
    move(student, 1)
    names = (n.replace("/", ".").removeprefix("model.") for n, _ in teacher.kept.named_parameters())
    ours = dict(student.model.named_parameters())
    trained = [ours[n] if n in ours else ours[f"model.{n}"] for n in names]
    assert all(p.requires_grad for p in trained)
    assert len(trained) == sum(p.requires_grad for p in student.parameters())
    for step in range(n):
        teacher.follow(step + 1)
    for kept, start, end in zip(teacher.kept.parameters(), begun, trained, strict=True):
        expected = end + (1 - a) ** n * (start - end)
        assert (kept - expected).abs().max() < 1e-12
        assert kept.dtype == torch.float64 and not kept.requires_grad


def test_an_average_takes_in_what_is_lost_in_16_bits(student_folder: str) -> None:
    torch.set_default_dtype(torch.float32)
    student = load_scorer(student_folder, torch.float32)
    teacher = taught(MovingAverage(1e-4), student, student_folder)
    assert teacher.kept is not None
    kept, ours = next(teacher.kept.parameters()), next(student.parameters())
    start = kept.clone()
    with torch.no_grad():
        ours.mul_(1.01)
    teacher.follow(1)
    moved = (kept - start)[start.abs() > 1e-2]
    assert kept.dtype == torch.float32 and bool((moved != 0).all())
    # 1e-6 of the value: a bfloat16 copy would have stayed.
    assert bool((kept.bfloat16() == start.bfloat16()).float().mean() > 0.99)


def test_second_adapters_leave_the_students_as_they_are(
    student_folder: str, batch: RolloutBatch
) -> None:
    student = load_scorer(student_folder, torch.float64, lora=LoRA(4))
    teacher = taught(MovingAverage(0.5), student, student_folder)
    move(student, 1)
    teacher.follow(1)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    scores = teacher.score(batch)
    for name, value in student.named_parameters():
        assert torch.equal(value, before[name]), name
        assert value.requires_grad == (".lora_" in name)
    # Factors are averaged: B starts at 0, so that half of it meets the average of A.
    expected = copy.deepcopy(student)
    start = load_scorer(student_folder, torch.float64, lora=LoRA(4))
    with torch.no_grad():
        for mixed, old in zip(expected.parameters(), start.parameters(), strict=True):
            mixed.lerp_(old, 0.5)
    same(scores, expected.score(batch, 1).map(Tensor.detach))


# ---- the trust region


def rows(scorer: Scorer, batch: RolloutBatch) -> Tensor:
    """Logits of every completion token, from the model itself, a row at a time."""
    out = []
    for row in range(len(batch)):
        start, end = int(batch.prompt_lengths[row]), int(batch.lengths[row])
        logits = scorer.model(input_ids=batch.input_ids[row, :end][None]).logits[0]
        out.append(logits[start - 1 : end - 1])
    return torch.cat(out).detach()


@pytest.mark.parametrize("share", [0.05, 0.7])
def test_a_trust_region_mixes_the_logits(
    student: Scorer, student_folder: str, batch: RolloutBatch, share: float
) -> None:
    teacher = taught(TrustRegion(share), student, student_folder)
    first = rows(student, batch)
    move(student, 1)
    mixed = (1 - share) * first + share * rows(student, batch)
    expected = (mixed / batch.temperature).log_softmax(-1)
    asked = torch.randint(0, 16, (*batch.completion_ids.shape, 3))
    scores, mask = teacher.score(batch, asked), batch.completion_mask
    chosen = expected.gather(-1, batch.completion_ids[mask][:, None])[:, 0]
    torch.testing.assert_close(scores.logprobs[mask], chosen, rtol=0, atol=1e-10)
    assert scores.entropy is not None and scores.topk_ids is not None
    entropy = -(expected.exp() * expected).sum(-1)
    torch.testing.assert_close(scores.entropy[mask], entropy, rtol=0, atol=1e-10)
    assert torch.equal(scores.topk_ids[mask][:, 0], expected.argmax(-1))
    assert scores.topk_logprobs is not None
    wanted = expected.gather(-1, asked[mask])
    torch.testing.assert_close(scores.topk_logprobs[mask], wanted, rtol=0, atol=1e-10)
    assert not scores.logprobs[~mask].any()
    alone = teacher.score(batch)
    torch.testing.assert_close(alone.logprobs, scores.logprobs, rtol=0, atol=1e-12)
    assert alone.topk_logprobs is None


def test_heads_with_a_bias_are_mixed_too() -> None:
    from kdrl_lightning.losses.logprobs import Head

    shapes = [(5, 4), (7, 4), (7,)]
    (h, w, b), (g, v, c) = ([torch.randn(s) for s in shapes] for _ in range(2))
    found = mix(Other(h, Head(w, b, scale=2.0)), Other(g, Head(v, c, scale=2.0)), 0.3, False)
    expected = 0.7 * 2 * (h @ w.T + b) + 0.3 * 2 * (g @ v.T + c)
    torch.testing.assert_close(found.head.logits(found.hidden), expected, rtol=0, atol=1e-12)


def gradients(student: Scorer, batch: RolloutBatch, other: Other) -> list[Tensor]:
    """Of KL(student || other) over the full vocabulary, by the trained parameters."""
    objective = GKD(jsd_beta=1.0)
    ready = batch.replace(imitation_mask=batch.loss_mask, totals=batch.count(9))
    scores = student.score(batch, 1, None, other, objective.divergence)
    loss, _ = objective(ready, scores)
    trained = [p for p in student.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]


def test_sharing_weights_gives_the_gradient_of_a_deep_copy(
    whole: Scorer, student_folder: str, batch: RolloutBatch
) -> None:
    """Behind another prompt: the live teacher's states, against those of a second model."""
    live = taught(LiveWeights(), whole, student_folder)
    behind = collate([[7, *p] for p in PROMPTS], COMPLETIONS, [0, 1, 2], pad_id=0)
    second = copy.deepcopy(whole)
    with torch.no_grad():
        apart = second.states(behind)
    ours, theirs = (gradients(whole, batch, o) for o in (live.states(behind), apart))
    assert max(float(g.abs().max()) for g in theirs) > 1e-4
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_a_trust_region_behind_the_same_prompt_scales_the_pull_to_the_start(
    whole: Scorer, student_folder: str, batch: RolloutBatch
) -> None:
    share = 0.3
    mixed, initial = (
        taught(rule, whole, student_folder) for rule in (TrustRegion(share), InitialWeights())
    )
    move(whole, 1)
    ours, theirs = (gradients(whole, batch, t.states(batch)) for t in (mixed, initial))
    assert max(float(g.abs().max()) for g in theirs) > 1e-4
    # Behind the head, Qwen's norms compute in float32.
    names = [name for name, p in whole.named_parameters() if p.requires_grad]
    for name, a, b in zip(names, ours, theirs, strict=True):
        bound = 1e-12 if name == "model.lm_head.weight" else 1e-5 * float(b.abs().max())
        torch.testing.assert_close(a, (1 - share) * b, rtol=0, atol=bound)
    assert "model.lm_head.weight" in names


def test_a_live_teacher_behind_the_same_prompt_pulls_nowhere(
    whole: Scorer, student_folder: str, batch: RolloutBatch
) -> None:
    live = taught(LiveWeights(), whole, student_folder)
    move(whole, 1)
    same(live.score(batch), whole.score(batch, 1).map(Tensor.detach))
    found = gradients(whole, batch, live.states(batch))
    assert all(float(g.abs().max()) < 1e-15 for g in found)


# ---- what is refused


@pytest.mark.parametrize("make", [MovingAverage, TrustRegion])
@pytest.mark.parametrize("value", [-0.1, 1.01, math.nan, math.inf])
def test_a_share_outside_0_to_1_is_refused(make: Callable[..., Any], value: float) -> None:
    with pytest.raises(ConfigurationError, match=r"^`student_weight` must be .* got "):
        make(value)


@pytest.mark.parametrize(
    ("value", "rule"), [(0, "at least 1"), (-2, "at least 1"), (1.5, "a whole number")]
)
def test_a_sync_every_0_or_1_5_steps_is_refused(value: Any, rule: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^`every_n_steps` must be {rule}: got {value}"):
        HardSync(value)


@pytest.mark.parametrize("weights", ["live", None, LiveWeights, 0.05])
def test_weights_that_are_no_rule_are_refused(weights: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^`weights` must be a WeightRule: got .* Give"):
        SelfTeacher(weights)


class Prompted(Teacher):
    """A wrapper that gives a teacher its own prompt."""

    has_own_prompt = True

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def prepare(self) -> None: ...

    def check(self, student_tokenizer: Any, student_path: str) -> None: ...

    def load(self, device: torch.device) -> None: ...

    def score(self, batch: RolloutBatch, topk_ids: Tensor | None = None) -> TokenScores:
        return self.teacher.score(batch, topk_ids)


def test_the_current_student_needs_a_prompt_of_its_own() -> None:
    live = SelfTeacher(LiveWeights())
    words = r"^`weights` must not be LiveWeights .* its KL is 0 and teaches nothing"
    for teacher in (live, RoutedTeacher({"a": AdapterOffTeacher(), "b": live})):
        with pytest.raises(ConfigurationError, match=words):
            check_given(teacher, KDRL(), adapters=True)
    for rule in (MovingAverage(1.0), HardSync(1), TrustRegion(1.0)):
        with pytest.warns(UserWarning, match=f"{type(rule).__name__} has the student's weights"):
            check_given(SelfTeacher(rule), KDRL(), adapters=False)
    allowed = [
        *(Prompted(SelfTeacher(r)) for r in (LiveWeights(), MovingAverage(1.0), TrustRegion(1.0))),
        RoutedTeacher({"a": Prompted(live), "b": SelfTeacher(InitialWeights())}),
        *(SelfTeacher(r) for r in (MovingAverage(), HardSync(), TrustRegion(0.5))),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for teacher in allowed:
            check_given(teacher, KDRL(), adapters=False)


def test_kinds_are_found_inside_other_teachers() -> None:
    routed = RoutedTeacher(
        {"a": Prompted(SelfTeacher(MovingAverage())), "b": SelfTeacher(HardSync())}
    )
    assert FrozenModels(routed).kinds == ["MovingAverage", "HardSync"]
    assert FrozenModels(AdapterOffTeacher()).kinds == ["AdapterOffTeacher"]
    assert FrozenModels(None).kinds == []
    state = {"student.w": 1, "self_teachers.0.w": 2, "self_teachers_of_mine": 3}
    assert drop_kept(state) == {"student.w": 1, "self_teachers_of_mine": 3}


def test_scores_of_a_teacher_that_moves_are_not_cached(
    student: Scorer, student_folder: str, batch: RolloutBatch, tmp_path: Path
) -> None:
    for rule in (LiveWeights(), MovingAverage(), HardSync(), TrustRegion()):
        cached = CachedTeacher(SelfTeacher(rule), str(tmp_path / "scores.db"))
        cached.look_at(student, student_folder)
        words = rf"^`teacher` must keep its weights .* got SelfTeacher with {type(rule).__name__}"
        with pytest.raises(ConfigurationError, match=words):
            cached.load(CPU)
    cached = CachedTeacher(SelfTeacher(InitialWeights()), str(tmp_path / "scores.db"))
    cached.look_at(student, student_folder)
    cached.load(CPU)
    first = cached.score(batch)
    move(student, 1)
    same(cached.score(batch), first)
    assert (cached.hits, cached.misses) == (3, 3)


def test_logits_with_a_soft_cap_are_not_mixed(whole: Scorer, student_folder: str) -> None:
    whole.model.config.final_logit_softcapping = 30.0
    words = rf"^`weights` must not be TrustRegion .* soft cap: got {re.escape(student_folder)}"
    with pytest.raises(ConfigurationError, match=words):
        taught(TrustRegion(0.5), whole, student_folder)
    for rule in (TrustRegion(0.0), TrustRegion(1.0)):
        taught(rule, whole, student_folder)


def test_it_knows_the_students_limits_once_that_is_named(student_folder: str) -> None:
    teacher = SelfTeacher(MovingAverage())
    assert teacher.vocabulary_rows is teacher.context_length is None
    teacher.check(None, student_folder)
    assert (teacher.vocabulary_rows, teacher.context_length) == (16, 128)


def test_a_teacher_without_weights_says_so(batch: RolloutBatch, whole: Scorer) -> None:
    teacher = SelfTeacher(InitialWeights())
    with pytest.raises(RuntimeError, match=r"has no student: call look_at\(\) first"):
        teacher.score(batch)
    teacher.look_at(whole, "nowhere")
    with pytest.raises(RuntimeError, match=r"has no weights: call load\(\) first"):
        teacher.score(batch)


def test_another_students_weights_are_made_anew(
    student: Scorer, student_folder: str, batch: RolloutBatch
) -> None:
    teacher = taught(MovingAverage(0.5), student, student_folder)
    kept = teacher.kept
    teacher.look_at(student, student_folder)
    teacher.load(CPU)
    assert teacher.kept is kept  # of the same run
    other = copy.deepcopy(student)
    move(other, 1)
    teacher.look_at(other, student_folder)
    teacher.load(CPU)
    assert teacher.kept is not kept
    same(teacher.score(batch), other.score(batch, 1).map(Tensor.detach))
