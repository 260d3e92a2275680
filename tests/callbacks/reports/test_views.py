"""Tokens are marked imitated, punished, protected or dead exactly as the objectives say."""

from __future__ import annotations

import math

import pytest
import torch

from kdrl_lightning import GRPO, KDRL, RLAD, Verdict
from kdrl_lightning.callbacks.reports import (
    SampleView,
    Section,
    choose,
    cut_tokens,
    render,
    scored_views,
    text_view,
)
from kdrl_lightning.callbacks.reports.loggers import as_lines
from kdrl_lightning.callbacks.reports.page import _sample
from kdrl_lightning.engines import Completion
from kdrl_lightning.objectives import Objective
from kdrl_lightning.rollout.generation import Judged
from kdrl_lightning.rollout_batch import RolloutBatch, collate, pad_rows
from kdrl_lightning.tiny.models import make_tokenizer

TOKENIZER = make_tokenizer()
PROMPT, RIGHT, WRONG = (
    [TOKENIZER.convert_tokens_to_ids(c) for c in s] for s in ("1+2=", "33", "34")
)
END = TOKENIZER.eos_token_id


def batch(truncated: bool = False) -> RolloutBatch:
    """Two completions of one prompt, scored by a teacher that differs at column 1."""
    out = collate(
        [PROMPT, PROMPT],
        [[*RIGHT, END], WRONG],
        [0, 0],
        pad_id=TOKENIZER.pad_token_id,
        rewards=[1.0, 0.0],
        correct=[True, False],
        truncated=[False, truncated],
        mask_truncated=True,
    )
    old = torch.full((2, 3), math.log(0.5)) * out.completion_mask
    teacher = old.clone()
    teacher[:, 1] = torch.tensor([math.log(0.05), math.log(0.95)])
    return out.replace(old_logprobs=old, teacher_logprobs=teacher, rollout_logprobs=old)


def views(objective: Objective, moved: float = 0.0, truncated: bool = False) -> list[SampleView]:
    ready = objective.prepare(batch(truncated))
    assert ready.old_logprobs is not None
    logprobs = ready.old_logprobs.clone()
    logprobs[:, 0] += moved
    return scored_views(ready, logprobs, objective, TOKENIZER)


def fates(view: SampleView) -> list[str]:
    return [token.fate for token in view.tokens]


def test_without_a_clip_in_reach_the_advantage_decides() -> None:
    right, wrong = views(GRPO())
    assert fates(right) == ["rewarded"] * 3 and fates(wrong) == ["punished"] * 2
    assert not any(token.imitated for token in [*right.tokens, *wrong.tokens])
    assert [token.text for token in right.tokens] == ["3", "3", "<eos>"]
    assert (right.prompt, right.completion) == ("1+2=", "33<eos>")
    assert right.correct and not wrong.correct and right.reward == 1.0


def test_what_the_clip_removes_is_dead_or_protected() -> None:
    up = views(GRPO(), moved=1.0)
    assert fates(up[0])[:2] == ["dead", "rewarded"]
    assert fates(up[1])[:2] == ["punished", "punished"]
    down = views(GRPO(), moved=-1.0)
    assert fates(down[0])[0] == "rewarded" and fates(down[1])[0] == "protected"


def test_rlad_is_dead_where_the_teacher_dislikes_and_protects_where_it_likes() -> None:
    right, wrong = views(RLAD(trrd_alpha=0.0, log_ratio_clamp=None))
    assert fates(right) == ["rewarded", "dead", "rewarded"]
    assert fates(wrong) == ["punished", "protected"]
    assert [token.imitated for token in right.tokens] == [True, False, True]
    assert right.tokens[1].gap == pytest.approx(math.log(0.1))


def test_a_dead_token_of_kdrl_is_imitated_all_the_same() -> None:
    right, _ = views(KDRL(teacher_kl_coef=0.5), moved=1.0)
    assert (right.tokens[0].fate, right.tokens[0].imitated) == ("dead", True)


def test_what_is_not_in_the_loss_has_no_fate() -> None:
    _, wrong = views(KDRL(teacher_kl_coef=0.5), truncated=True)
    assert fates(wrong) == ["", ""]
    assert not any(token.used or token.imitated for token in wrong.tokens)


def test_parts_are_found_by_the_completion() -> None:
    judged = Judged(
        PROMPT, {}, Completion(WRONG, [0.0, 0.0], False), "34", Verdict(0, False, {"a": 2})
    )
    ready = GRPO().prepare(batch())
    right, wrong = scored_views(ready, ready.old_logprobs, GRPO(), TOKENIZER, [judged])  # type: ignore[arg-type]
    assert (right.parts, wrong.parts) == ({}, {"a": 2})
    plain = text_view(judged, "here", TOKENIZER)
    assert (plain.prompt, plain.completion, plain.parts) == ("1+2=", "34", {"a": 2})
    assert plain.tokens == ()


def test_a_group_with_both_comes_first() -> None:
    groups, correct = [0, 0, 1, 1, 2, 2], [True, True, False, True, True, False]
    assert choose(groups, correct, 9) == [3, 2, 4, 5, 0, 1]
    assert choose(groups, correct, 1) == [3]
    assert choose([], [], 3) == []


def test_tokens_of_a_chunk_show_its_gap() -> None:
    """A teacher with another tokenizer scored ``33`` as one token, and the wrong answer not."""
    scored = batch()
    places = torch.tensor([[0, 1, 0], [-1, -1, 0]])
    teacher = torch.tensor([[math.log(0.1)] * 2 + [math.log(0.5)], [0.0, 0.0, 0.0]])
    prompts, ends = torch.tensor([[70_000], [70_000]]), torch.tensor([9, 9])  # not the student's
    scored = scored.replace(teacher_prompt_ids=prompts, teacher_ends=ends)
    ready = KDRL().prepare(scored.replace(chunk_places=places, teacher_logprobs=teacher))
    assert ready.old_logprobs is not None
    right, wrong = scored_views(ready, ready.old_logprobs, KDRL(), TOKENIZER)
    assert [t.joined for t in right.tokens] == [False, True, False]
    assert [t.gap for t in right.tokens] == pytest.approx([math.log(0.4)] * 2 + [0.0])
    assert all(t.gap is None and not t.imitated for t in wrong.tokens)
    page = render("x", [Section("now", {}, {"rollout": [right, wrong]})], 10)
    assert page.count(' joined"') == 2  # in the legend and on the second digit


def test_what_the_teacher_reads_is_shown() -> None:
    def ids(text: str) -> list[int]:
        return [TOKENIZER.convert_tokens_to_ids(c) for c in text]

    own = pad_rows([ids("33#1+2="), PROMPT], -1, torch.long)
    some = batch().replace(teacher_prompt_ids=own, has_context=torch.tensor([True, False]))
    ready = GRPO().prepare(some)
    seen, not_seen = scored_views(ready, ready.old_logprobs, GRPO(), TOKENIZER)
    assert (seen.teacher_prompt, not_seen.teacher_prompt) == ("33#1+2=", "")
    assert seen.title == "group 0, the student's completion"
    assert not_seen.title == "group 0, the student's completion, without a context"
    assert "the teacher reads: <bdi>33#1+2=</bdi>" in _sample(seen, 9)
    assert "teacher reads" not in _sample(not_seen, 9) + "".join(as_lines(not_seen))
    assert as_lines(seen)[3:5] == ["the teacher reads:", "33#1+2="]


def test_completions_in_which_the_clip_acts_come_first() -> None:
    groups, correct = [0, 0, 1, 1, 1, 1], [True, False, True, True, False, False]
    assert choose(groups, correct, 4, cut=[0, 1, 0, 3, 0, 2]) == [3, 5, 0, 1]
    # The first group has more; without a cut in any, the order is that of the batch.
    assert choose(groups, correct, 2, cut=[9, 0, 0, 3, 0, 2]) == [0, 1]
    assert choose(groups, correct, 4, cut=[0] * 6) == choose(groups, correct, 4) == [0, 1, 2, 4]


def test_cut_tokens_are_the_dead_and_the_protected() -> None:
    objective = RLAD(trrd_alpha=0.0, log_ratio_clamp=None)
    for truncated, expected in ((False, [1, 1]), (True, [1, 0])):
        ready = objective.prepare(batch(truncated))
        assert ready.old_logprobs is not None
        assert cut_tokens(ready, ready.old_logprobs, objective) == expected
    assert cut_tokens(ready, ready.old_logprobs, GRPO()) == [0, 0]
