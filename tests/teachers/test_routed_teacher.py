"""Several teachers, each for its own prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.short_runs import fit, make_data, make_module
from kdrl_lightning import GKD, KDRL, CachedTeacher, LocalTeacher, RoutedTeacher
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses.logprobs import TokenScores
from kdrl_lightning.models.loading import load_tokenizer
from kdrl_lightning.rollout_batch import RolloutBatch, collate

pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")

CPU = torch.device("cpu")


@pytest.fixture
def two(student_folder: str, teacher_folder: str) -> RoutedTeacher:
    made = RoutedTeacher(
        {"near": LocalTeacher(student_folder), "far": LocalTeacher(teacher_folder)}
    )
    made.check(load_tokenizer(student_folder), student_folder)
    made.load(CPU)
    return made


def batch_of(route: list[int]) -> RolloutBatch:
    prompts = [[5, 6, 7], [8], [3, 3], [4, 9, 9, 2]]
    completions = [[9, 1], [4, 4, 4, 1], [2], [7, 7, 7]]
    return collate(prompts, completions, [0, 1, 2, 3], pad_id=0, teacher_route=route)


def equal(ours: TokenScores, theirs: TokenScores) -> None:
    for name in TokenScores._fields:
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("route", [[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
@pytest.mark.parametrize("asked", [False, True])
def test_a_mixed_batch_has_each_teachers_own_scores(
    two: RoutedTeacher, route: list[int], asked: bool
) -> None:
    batch = batch_of(route)
    ids = torch.randint(0, 16, (*batch.completion_ids.shape, 3)) if asked else None
    got = two.score(batch, ids)
    assert (got.topk_logprobs is not None) == asked
    alone = [t.score(batch, ids) for t in two.teachers.values()]
    for row, index in enumerate(route):
        equal(got.map(lambda v, r=row: v[r]), alone[index].map(lambda v, r=row: v[r]))
    assert (alone[0].logprobs - alone[1].logprobs).abs().max() > 0.1
    assert not got.logprobs[~batch.completion_mask].any()


class WithoutEntropy(LocalTeacher):
    """Tells log-probabilities alone, and wants every rank."""

    knows_entropy = False
    collective = True  # type: ignore[assignment]

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.parts: list[int] = []

    def score(self, batch: RolloutBatch, topk_ids: torch.Tensor | None = None) -> TokenScores:
        self.parts.append(len(batch))
        return super().score(batch, topk_ids)._replace(entropy=None)


@pytest.mark.parametrize("route", [[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
def test_a_field_that_one_of_them_lacks_is_lacking_whatever_the_rows(
    tmp_path: Path, student_folder: str, teacher_folder: str, route: list[int]
) -> None:
    # Else the statistics of two ranks would have different names.
    silent = WithoutEntropy(student_folder)
    made = RoutedTeacher({"near": LocalTeacher(teacher_folder), "far": silent})
    made.check(load_tokenizer(student_folder), student_folder)
    made.load(CPU)
    assert not made.knows_entropy
    assert not CachedTeacher(made, str(tmp_path / "scores.sqlite")).knows_entropy
    assert made.score(batch_of(route)).entropy is None
    assert silent.parts == ([sum(route)] if any(route) else [1])  # it takes part in any case


def test_a_row_names_its_teacher(two: RoutedTeacher) -> None:
    assert [two.route({"teacher": name}) for name in ("near", "far", "near")] == [0, 1, 0]
    other = RoutedTeacher(two.teachers, column="judge")
    assert other.route({"judge": "far", "teacher": "near"}) == 1


@pytest.mark.parametrize(
    ("row", "found"), [({}, "None"), ({"teacher": "nobody"}, "'nobody'"), ({"teacher": 0}, "0")]
)
def test_a_row_that_names_none_is_refused(
    two: RoutedTeacher, row: dict[str, Any], found: str
) -> None:
    with pytest.raises(ConfigurationError, match=rf"`teacher` .* one of near, far: got {found}\."):
        two.route(row)


def test_no_teachers_are_refused() -> None:
    with pytest.raises(
        ConfigurationError, match="`teachers` must have at least one teacher: got none"
    ):
        RoutedTeacher({})


def rows(names: list[str | None]) -> list[dict[str, str]]:
    made = [{"prompt": f"{i}123+4567=", "answer": str(i)} for i in range(len(names))]
    return [r if n is None else {**r, "teacher": n} for r, n in zip(made, names, strict=True)]


def test_a_run_takes_each_rows_teacher(
    tmp_path: Path, student_folder: str, two: RoutedTeacher
) -> None:
    prompts = rows(["near", "far", "far", "near"])
    data = make_data(train_prompts=prompts, val_prompts=None, minibatches_per_rollout=1)
    module = make_module(student_folder, two, KDRL(0.5))
    trace = fit(tmp_path, module, data, max_steps=1, accumulate_grad_batches=2)
    tokenizer = load_tokenizer(student_folder)
    by_prompt = {tuple(tokenizer.encode(r["prompt"])): r["teacher"] for r in prompts}
    seen = set()
    for _, batch in trace.seen:
        for row in range(len(batch)):
            name = by_prompt[tuple(batch.input_ids[row, : batch.prompt_lengths[row]].tolist())]
            assert list(two.teachers)[batch.teacher_route[row]] == name
            seen.add(name)
            expected = two.teachers[name].score(batch.select([row])).logprobs[0]
            got = batch.teacher_logprobs[row, : len(expected)]
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert seen == {"near", "far"}


def test_a_row_without_a_teacher_is_refused_before_the_run(
    tmp_path: Path, student_folder: str, two: RoutedTeacher
) -> None:
    data = make_data(train_prompts=rows(["near", "far", None, "near"]), val_prompts=None)
    with pytest.raises(ConfigurationError, match=r"one of near, far: got None\. Add the column"):
        fit(tmp_path, make_module(student_folder, two, KDRL(0.5)), data)


def test_it_scores_and_does_not_generate(
    tmp_path: Path, student_folder: str, two: RoutedTeacher
) -> None:
    assert not two.generates and two.weights() is None
    with pytest.raises(ConfigurationError, match=r"must give hidden states .* got RoutedTeacher"):
        two.states(batch_of([0, 1, 0, 1]))
    data = make_data(teacher_completions=1)
    with pytest.raises(ConfigurationError, match=r"one that can generate .* got RoutedTeacher"):
        fit(tmp_path, make_module(student_folder, two, GKD(top_k=2)), data)


def test_it_cannot_be_cached_as_one(two: RoutedTeacher, tmp_path: Path) -> None:
    cached = CachedTeacher(two, str(tmp_path / "scores.db"))
    with pytest.raises(
        ConfigurationError, match=r"got RoutedTeacher.*Wrap each of its teachers in a Cached"
    ):
        cached.load(CPU)
