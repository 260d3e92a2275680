"""Whole runs on large sources, on sources with bad rows, and on the same prompts again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from helpers.short_runs import Log, Trace, fit, make_data, make_module, make_trainer
from kdrl_lightning import GRPO, RLAD, ExactMatch, LocalTeacher
from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.prompts import PromptSource
from kdrl_lightning.prompts.prompt_set import CHECKED_ROWS, sample_rows
from kdrl_lightning.rewards import TaskReward
from kdrl_lightning.rollout.loader import rows_at
from kdrl_lightning.teachers import CachedTeacher, RoutedTeacher

pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")

SIZE = 10**6
CHECKED = set(sample_rows(SIZE, CHECKED_ROWS, 0))
# The prompts of the first rollouts, four each; none of them is looked at before a run.
ROLLOUTS = [rows_at(range(4 * r, 4 * r + 4), SIZE, 0) for r in range(4)]
assert not CHECKED & {row for rows in ROLLOUTS for row in rows}
BAD = ROLLOUTS[0][2]  # its slot takes ROLLOUTS[1][2] instead


class Sums(PromptSource):
    """A million rows; some are something else."""

    def __init__(self, other: Mapping[int, Any] | None = None) -> None:
        self.other = other or {}
        self.read: list[int] = []

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.read.append(index)
        row = {"prompt": f"{index}=", "answer": "1", "teacher": "near"}
        return {**row, **self.other.get(index, {})}


def prompts_in(trace: Trace) -> list[list[str]]:
    """Return the prompts of each rollout of two updates."""
    rollouts: list[set[str]] = []
    for step, batch in trace.seen:  # one micro-batch each
        if step % 2 == 0:
            rollouts.append(set())
        for ids, length in zip(batch.input_ids, batch.prompt_lengths, strict=True):
            rollouts[-1].add("".join(SYMBOLS[i] for i in ids[:length].tolist()))
    return [sorted(found) for found in rollouts]


SYMBOLS = {i + 2: str(i) for i in range(10)} | {13: "="}


def named(rows: list[int]) -> list[str]:
    return sorted(f"{row}=" for row in rows)


def run(tmp_path: Path, student: str, source: Any, steps: int = 4, **changes: Any) -> Any:
    trainer = changes.pop("trainer", {})
    teacher = changes.pop("teacher", None)
    log = Log()
    data = make_data(train_prompts=source, **{"val_prompts": None, **changes})
    module = make_module(student, teacher, GRPO())
    return prompts_in(fit(tmp_path, module, data, [log], max_steps=steps, **trainer)), log.rows


def test_a_run_reads_a_sample_and_what_it_draws(tmp_path: Path, student_folder: str) -> None:
    source = Sums()
    found, rows = run(tmp_path, student_folder, source)
    assert found == [named(rows) for rows in ROLLOUTS[:2]]
    assert sorted(source.read) == sorted([*CHECKED, *ROLLOUTS[0], *ROLLOUTS[1]])
    assert [row["rollout/bad_rows"] for row in rows] == [0.0] * 4


INSTEAD = [named([*ROLLOUTS[0][:2], ROLLOUTS[1][2], ROLLOUTS[0][3]]), named(ROLLOUTS[1])]


class Answered(TaskReward):
    """Cannot judge a row without an answer."""

    def __call__(self, sample: Any) -> float:
        return float(len(sample.ids) % 2)

    def check(self, row: Mapping[str, Any]) -> None:
        if row["answer"] is None:
            raise ConfigurationError("no answer.")


@pytest.mark.parametrize(
    ("change", "words", "settings"),
    [
        ({"prompt": None}, "must be a string or a list of chat messages: got None", {}),
        ({"answer": None}, r"no answer\.", {"reward": Answered()}),
        ({"answer": None}, "answer", {"reward": ExactMatch()}),
    ],
    ids=["prompt", "reward", "exact match"],
)
def test_a_bad_row_is_replaced_named_and_counted(
    tmp_path: Path, student_folder: str, change: Any, words: str, settings: Any
) -> None:
    with pytest.warns(UserWarning, match=rf"^skipped row {BAD} of `train_prompts`: .*{words}"):
        found, rows = run(tmp_path, student_folder, Sums({BAD: change}), **settings)
    assert found == INSTEAD
    assert [row["rollout/bad_rows"] for row in rows] == [1.0, 1.0, 0.0, 0.0]


def test_a_row_without_a_teacher_is_replaced(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    teacher = RoutedTeacher({"near": LocalTeacher(teacher_folder)})
    source = Sums({BAD: {"teacher": "far"}})
    words = rf"^skipped row {BAD} of `train_prompts`: the column `teacher` .* got 'far'"
    with pytest.warns(UserWarning, match=words):
        found, _ = run(tmp_path, student_folder, source, teacher=teacher)
    assert found == INSTEAD


def test_a_long_prompt_later(tmp_path: Path, student_folder: str) -> None:
    source = Sums({BAD: {"prompt": "1" * 20}})
    found, rows = run(
        tmp_path, student_folder, source, max_prompt_tokens=8, overlong_prompts="drop"
    )
    assert found == INSTEAD
    assert [row["rollout/bad_rows"] for row in rows] == [1.0, 1.0, 0.0, 0.0]
    words = rf"^row {BAD} of `train_prompts` has 20 tokens, above 8 .* Set `overlong_prompts: drop`"
    with pytest.raises(TrainingStopped, match=words):
        run(tmp_path, student_folder, source, max_prompt_tokens=8)
    words = rf"^row {BAD} .* has 20 tokens, above 18 \(`max_tokens_per_micro_batch`\)"
    with pytest.raises(TrainingStopped, match=words):
        # Two prompts a step with four completions of ten tokens each: 8 * (18 + 10) is 224.
        run(tmp_path, student_folder, source, max_tokens_per_micro_batch=224)


def test_too_many_bad_rows_stop_the_run(tmp_path: Path, student_folder: str) -> None:
    source = Sums({row: {"prompt": None} for row in ROLLOUTS[0][:2]})
    words = r"^2 of the 6 prompts drawn in the last 1 rollouts cannot be used, above 10%\. Correct"
    with (
        pytest.warns(UserWarning, match="^skipped row"),
        pytest.raises(TrainingStopped, match=words),
    ):
        run(tmp_path, student_folder, source)


def test_a_large_evaluation_set_leaves_out_what_it_cannot_use(
    tmp_path: Path, student_folder: str
) -> None:
    source = Sums({3: {"prompt": float("nan")}})
    assert 3 not in sample_rows(SIZE, 10_000, 0)
    data = make_data(val_prompts=source, val_batch_size=8)
    trainer = make_trainer(tmp_path, limit_val_batches=1)
    words = r"^the evaluation leaves out a row: row 3 of `val_prompts`: .*got nan"
    with pytest.warns(UserWarning, match=words):
        trainer.validate(make_module(student_folder, None, GRPO()), data, verbose=False)
    assert sorted(source.read[-8:]) == list(range(8))


def test_overfit_batches_trains_on_the_same_prompts(tmp_path: Path, student_folder: str) -> None:
    trainer = {"overfit_batches": 4, "max_epochs": 3}
    found, _ = run(
        tmp_path, student_folder, Sums(), steps=12, rollouts_per_epoch=None, trainer=trainer
    )
    assert found == [named(rows) for rows in ROLLOUTS[:2]] * 3
    words = (
        r"^`overfit_batches` must be whole rollouts of 2 micro-batches, whose prompts then come "
        r"again and again: got 3, which is 3 of 4\. Set `overfit_batches: 2`\.$"
    )
    with pytest.raises(ConfigurationError, match=words):
        run(tmp_path, student_folder, Sums(), trainer={"overfit_batches": 3})


def with_tokens(folder: str, to: Path, **special: str) -> str:
    shutil.copytree(folder, to)
    tokenizer = AutoTokenizer.from_pretrained(to)
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(to)
    return str(to)


def test_a_pad_token_beyond_the_embedding_changes_nothing(
    tmp_path: Path, student_folder: str
) -> None:
    padded = with_tokens(student_folder, tmp_path / "padded", pad_token="<more>")
    assert AutoTokenizer.from_pretrained(padded).pad_token_id == 16
    runs = []
    for folder in (student_folder, padded):
        data = make_data(val_prompts=None)
        trace = fit(tmp_path, make_module(folder, None, GRPO()), data, max_steps=2)
        runs.append([batch for _, batch in trace.seen])
    for one, other in zip(*runs, strict=True):
        assert other.input_ids.max() < 16
        assert one.completion_lengths.tolist() == other.completion_lengths.tolist()
        assert one.rewards.tolist() == other.rewards.tolist()
        assert one.rollout_logprobs.tolist() == other.rollout_logprobs.tolist()


def test_the_padding_is_one_that_the_teacher_knows_too(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    module = make_module(student_folder, teacher_folder, RLAD())
    teacher = module.teacher
    assert isinstance(teacher, LocalTeacher) and teacher.vocabulary_rows == 16
    # The pad token is 0 and the end token 1 here; a teacher with fewer rows cannot be so small.
    data = make_data(val_prompts=None)
    fit(tmp_path, module, data, max_steps=1)
    for rows, pad in ((16, 0), (0, 1)):
        data.live.vocabulary_rows = rows
        assert data.live.pad_id == pad
    assert RoutedTeacher({"a": teacher, "b": CachedTeacher(teacher, "c")}).vocabulary_rows == 16


def test_tokens_beyond_the_embedding_are_refused(tmp_path: Path, student_folder: str) -> None:
    more = with_tokens(student_folder, tmp_path / "more", bos_token="<more>")
    words = (
        r"^row 1 of `train_prompts`: every token must have one of the 16 rows of the student's "
        r"embedding: got the token '<more>', id 16\."
    )
    with pytest.raises(ConfigurationError, match=words):
        run(tmp_path, more, [{"prompt": "1="}, {"prompt": "<more>1="}] * 2)


def test_a_resumed_run_draws_and_counts_as_the_whole_one(
    tmp_path: Path, student_folder: str
) -> None:
    path, seen = tmp_path / "first.ckpt", []
    for steps, resumed in ((2, None), (4, path)):
        data = make_data(train_prompts=Sums({BAD: {"prompt": None}}), val_prompts=None)
        trace = Trace()
        trainer = make_trainer(tmp_path, max_steps=steps, callbacks=[trace])
        module = make_module(student_folder, None, GRPO())
        if resumed is None:
            with pytest.warns(UserWarning, match="^skipped row"):
                trainer.fit(module, data)
            trainer.save_checkpoint(path)
        else:
            trainer.fit(module, data, ckpt_path=str(resumed), weights_only=False)
        seen += prompts_in(trace)
    assert seen == INSTEAD
    assert data.collector.counts.state_dict() == {"last": [[5.0, 1.0], [4.0, 0.0]], "named": 1}
