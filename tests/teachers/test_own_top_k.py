"""The teacher's own most likely tokens, against its logits of each row alone."""

from __future__ import annotations

import pytest
import torch

from kdrl_lightning import EOPD, ConfigurationError, LocalTeacher, PublishedSRPO
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.rollout_batch import RolloutBatch, collate
from kdrl_lightning.teachers.frozen import FrozenModels, check_scores

ROWS = {"prompts": [[3, 4], [3, 4], [5]], "completions": [[6, 7, 8], [7], [8, 6]]}


def scored(folder: str, student: str, top_k: int) -> tuple[LocalTeacher, RolloutBatch]:
    teacher = LocalTeacher(folder, "float64")
    frozen = FrozenModels(teacher)
    teacher.check(tokenizer(student), student)
    teacher.load(torch.device("cpu"))
    batch = collate(**ROWS, group_ids=[0, 0, 1], pad_id=0).replace(temperature=0.7)
    return teacher, frozen.score_teacher(batch, None, top_k)


def tokenizer(folder: str) -> object:
    from kdrl_lightning.models.loading import load_tokenizer

    return load_tokenizer(folder)


@pytest.mark.parametrize("top_k", [1, 4, 10_000])
def test_they_are_the_teacher_s_own(top_k: int, student_folder: str, teacher_folder: str) -> None:
    _, batch = scored(teacher_folder, student_folder, top_k)
    model = load_causal_lm(teacher_folder).double()
    ids, at = batch.teacher_topk_ids, batch.teacher_topk_logprobs
    for row, (prompt, completion) in enumerate(zip(*ROWS.values(), strict=True)):
        whole = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            logits = model(input_ids=whole, use_cache=False).logits[0] / 0.7
        for t, token in enumerate(completion):
            logprobs = logits[len(prompt) - 1 + t].log_softmax(-1)
            k = min(top_k, len(logprobs))
            best = logprobs.topk(k)
            assert ids[row, t].tolist() == best.indices.tolist()
            torch.testing.assert_close(at[row, t], best.values, rtol=1e-5, atol=1e-6)
            rest = 1.0 - best.values.exp().sum()
            tail = batch.teacher_tail_logprobs[row, t].exp()
            torch.testing.assert_close(tail, rest.clamp(min=0), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(batch.teacher_logprobs[row, t], logprobs[token])
            entropy = -(logprobs.exp() * logprobs).sum()
            torch.testing.assert_close(batch.teacher_entropy[row, t], entropy)
            assert batch.teacher_top_ids[row, t] == best.indices[0]
    out = ~batch.completion_mask
    assert ids[out].eq(0).all() and at[out].eq(0).all()


def test_without_a_wish_the_batch_names_none(student_folder: str, teacher_folder: str) -> None:
    _, batch = scored(teacher_folder, student_folder, 0)
    assert batch.teacher_topk_ids is None and batch.teacher_logprobs is not None


class OnlyScores(LocalTeacher):
    gives_states = False
    knows_entropy = False


def test_a_teacher_that_cannot_name_them_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="to name its own most likely tokens: got Only"):
        check_scores(OnlyScores("folder"), EOPD())
    with pytest.raises(ConfigurationError, match="must return its entropy for PublishedSRPO"):
        check_scores(OnlyScores("folder"), PublishedSRPO())
    check_scores(LocalTeacher("folder"), EOPD())
