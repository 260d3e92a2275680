"""Teachers of every kind on a pretended GPU: the CPU's scores, and a bounded number of waits.

tests/runs/test_on_a_card.py bounds whole runs; these are the kinds that those do not have.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.pretend_cuda import CUDA, Card, MixedDevicesError, pretend_cuda, to_card
from helpers.small_tokenizers import by_hand
from kdrl_lightning import (
    AdapterOffTeacher,
    CachedTeacher,
    ColumnContext,
    CrossTokenizerTeacher,
    LocalTeacher,
    LoRA,
    PromptedTeacher,
    RoutedTeacher,
    TeacherPrompt,
)
from kdrl_lightning.losses.logprobs import Head, TokenScores
from kdrl_lightning.models.loading import load_tokenizer
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import load_scorer
from kdrl_lightning.rollout_batch import RolloutBatch, collate
from kdrl_lightning.teachers import HardSync, MovingAverage, SelfTeacher, Teacher, TrustRegion
from kdrl_lightning.teachers.frozen import FrozenModels
from kdrl_lightning.teachers.own_prompt.groups import Group
from kdrl_lightning.teachers.own_top_k import own_top_k
from kdrl_lightning.teachers.self_teachers.other_weights import blend
from kdrl_lightning.tiny.addition import SYMBOLS

PROMPTS, COMPLETIONS = ["12+34=", "1+1="], ["06,04#046", "2"]
ADAPTERS = LoRA(2)
# Waits of a score. The batch brought the layout of its rows along, so a pass needs none.
# The tokens that have scores, or a common distribution of two models.
TOKENS = 1
# Which teacher scores a row.
ROUTES = 1
# A cache reads ids, and three numbers of each row; it stores four tables and their lengths.
KEYS, STORED = 2, 5
# What is written in other tokens leaves the card for it.
OTHER_TOKENS = 5


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory, teacher_folder: str) -> str:
    """A teacher that writes 12 and 34 as one token each."""
    folder = tmp_path_factory.mktemp("merging")
    tokenizer = by_hand([*SYMBOLS, "12", "34"], [("1", "2"), ("3", "4")])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    config = AutoConfig.from_pretrained(teacher_folder)
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def batch_for(teacher: Teacher, folder: str) -> RolloutBatch:
    """Two completions, with the teacher's own prompts if it has any."""
    tokenizer = load_tokenizer(folder)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    completions = [[*tokenizer(text)["input_ids"], 1] for text in COMPLETIONS]
    batch = collate(prompts, completions, [0, 1], pad_id=0, teacher_route=[0, 1])
    groups = [
        Group([SimpleNamespace(row=row, prompt_ids=ids, completion=SimpleNamespace(ids=own))])  # type: ignore[list-item]
        for row, ids, own in zip(
            [{"prompt": text, "solution": "046"} for text in PROMPTS],
            prompts,
            completions,
            strict=True,
        )
    ]
    return FrozenModels(teacher).write_prompts(batch, groups)


def scored(
    teacher: Teacher, student: str, lora: LoRA | None, on_card: bool
) -> tuple[list[TokenScores], Counter[str], Counter[str]]:
    """Score before and after two optimizer steps; return scores, a score's waits, the steps'."""

    def work(waits: Counter[str]) -> tuple[list[TokenScores], Counter[str], Counter[str]]:
        device = CUDA if on_card else torch.device("cpu")
        scorer = load_scorer(student, torch.float32, lora=lora)
        if on_card:
            to_card(scorer)
        teacher.check(load_tokenizer(student), student)
        teacher.look_at(scorer, student)
        teacher.load(device)
        batch = batch_for(teacher, student)
        teacher.accept(batch)
        batch = batch.to(device)
        found = [teacher.score(batch)]
        waits.clear()
        for step in (1, 2):
            move(scorer)
            if isinstance(teacher, SelfTeacher):
                teacher.follow(step)
        steps = waits.copy()
        waits.clear()
        return [*found, teacher.score(batch)], waits.copy(), steps

    if not on_card:
        return work(Counter())
    with pretend_cuda() as waits:
        return work(waits)


def move(student: Scorer) -> None:
    """Change what is trained, as an optimizer step does."""
    with torch.no_grad():
        for p in student.parameters():
            if p.requires_grad:
                p.add_(torch.ones_like(p) / 16 + p / 8)


def plain(value: Tensor) -> Tensor:
    return value.inner if isinstance(value, Card) else value


@pytest.mark.parametrize(
    ("make", "lora", "bound"),
    [
        (lambda _: AdapterOffTeacher(), ADAPTERS, 0),
        (lambda _: SelfTeacher(MovingAverage(0.25)), None, 0),
        (lambda _: SelfTeacher(MovingAverage(0.25)), ADAPTERS, 0),
        (lambda _: SelfTeacher(HardSync(2)), None, 0),
        (lambda _: SelfTeacher(TrustRegion(0.5)), None, TOKENS),
        (lambda _: SelfTeacher(TrustRegion(0.5)), ADAPTERS, TOKENS),
        (
            lambda path: PromptedTeacher(
                LocalTeacher(path), TeacherPrompt(ColumnContext("solution"), "{context}#{prompt}")
            ),
            None,
            0,
        ),
        (lambda path: CrossTokenizerTeacher(LocalTeacher(path)), None, OTHER_TOKENS),
        (lambda path: LocalTeacher(path, offload=True), None, 0),
        (
            lambda path: RoutedTeacher({"a": LocalTeacher(path), "b": LocalTeacher(path)}),
            None,
            ROUTES,
        ),
    ],
    ids=[
        *("adapter-off", "average", "average-lora", "hard-sync", "trust-region"),
        *("trust-region-lora", "prompted", "cross-tokenizer", "offloaded", "routed"),
    ],
)
def test_scores_on_a_card_are_the_cpus(
    make: Any,
    lora: LoRA | None,
    bound: int,
    student_folder: str,
    teacher_folder: str,
    merging: str,
    request: pytest.FixtureRequest,
) -> None:
    path = merging if "cross" in request.node.callspec.id else teacher_folder
    (wanted, _, _), (found, waits, steps) = (
        scored(make(path), student_folder, lora, on_card) for on_card in (False, True)
    )
    assert not steps, dict(steps)  # following the student is no reason to wait
    del waits["transformers"]  # its masks look at their padding
    assert sum(waits.values()) <= bound, dict(waits)
    for ours, theirs in zip(found, wanted, strict=True):
        for name, value in theirs._asdict().items():
            mine = getattr(ours, name)
            assert (mine is None) == (value is None), name
            if isinstance(value, Tensor):
                assert isinstance(mine, Card), name
                torch.testing.assert_close(plain(mine), plain(value), rtol=1e-4, atol=1e-5)


def test_a_cache_waits_no_more_for_more_rows(
    student_folder: str, teacher_folder: str, tmp_path: Path
) -> None:
    batch = batch_for(LocalTeacher(teacher_folder), student_folder)
    found = []
    with pretend_cuda() as waits:
        teacher = CachedTeacher(LocalTeacher(teacher_folder), str(tmp_path / "scores"))
        teacher.load(CUDA)
        here = batch.to(CUDA)
        for most in (KEYS + STORED, KEYS):  # nothing, then all rows are in the file
            waits.clear()
            found.append(teacher.score(here))
            del waits["transformers"]
            assert sum(waits.values()) <= most, dict(waits)
    for name, value in found[0]._asdict().items():
        if value is not None:
            torch.testing.assert_close(plain(getattr(found[1], name)), plain(value))


@pytest.mark.parametrize("swap", [(1, 3), (4, 0)])
def test_two_swapped_tokens_need_no_wait(swap: tuple[int, int]) -> None:
    weight, hidden = torch.randn(5, 3), torch.randn(2, 3)
    logits = (hidden @ weight.T)[
        :, [swap[::-1][swap.index(i)] if i in swap else i for i in range(5)]
    ]
    with pretend_cuda() as waits:
        head, states = Head(weight.to("cuda"), swap=swap), hidden.to("cuda")
        waits.clear()
        found = head.logits(states)
        assert not waits, dict(waits)
    torch.testing.assert_close(plain(found), logits)


def test_the_teachers_own_tokens_are_found_once(teacher_folder: str, student_folder: str) -> None:
    batch = batch_for(LocalTeacher(teacher_folder), student_folder)
    with pretend_cuda() as waits:
        teacher = LocalTeacher(teacher_folder)
        teacher.load(CUDA)
        here = batch.to(CUDA)
        waits.clear()
        own_top_k(teacher, here, 3)
        del waits["transformers"]
        assert sum(waits.values()) <= TOKENS, dict(waits)


def test_weights_on_two_devices_are_not_blended() -> None:
    with pretend_cuda():
        kept, student = torch.zeros(3, device="cuda"), torch.ones(3)
        with pytest.raises(MixedDevicesError, match="lerp_"):
            blend([kept], [student], 0.25)
