"""Named evaluation sets: what is refused, which defaults apply, and what a run logs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.short_runs import fit, make_data, make_module, make_trainer
from kdrl_lightning import GRPO, EvalSet, ExactMatch, Sample
from kdrl_lightning.__main__ import main
from kdrl_lightning.callbacks import FSDPCheckpoint, RunReport
from kdrl_lightning.engines import Sampling
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.evaluation import EvaluationSettings, NamedSet, named_sets
from kdrl_lightning.evaluation.source import EvaluationSource
from kdrl_lightning.rewards import WeightedRewards
from kdrl_lightning.rewards.answers.extraction import answer_of
from kdrl_lightning.tiny import ColumnAddition

DEFAULT = EvaluationSettings(64, 2, 0.7)
ROWS = [{"prompt": "1+2="}]
TWO = {
    "near": EvalSet(ColumnAddition(5, seed=2), samples=3, temperature=1.0, batch_size=2, k=[1, 2]),
    "far": EvalSet(ColumnAddition(3, digits=3, seed=3), max_tokens=6),
}


def test_a_set_takes_what_it_does_not_say_from_the_defaults() -> None:
    near, far = named_sets(
        {"near": EvalSet(ROWS, k=[1]), "far": EvalSet(ROWS, 4)}, "x", DEFAULT, 16
    )
    assert near == NamedSet("near", ROWS, 2, Sampling(16, 0.7), 64, (1,))
    assert far == NamedSet("far", ROWS, 4, Sampling(16, 0.7), 64, (4,))
    assert named_sets(ROWS, "x", DEFAULT, 16)[0].name == ""
    assert named_sets(None, "x", DEFAULT, 16) == []


def test_a_set_takes_the_limits_of_the_defaults_or_its_own() -> None:
    default = EvaluationSettings(64, 2, 0.6, top_p=0.95, top_k=20, min_p=0.1)
    near, far = named_sets(
        {"near": EvalSet(ROWS), "far": EvalSet(ROWS, top_p=1.0, top_k=0, min_p=0.0)},
        *("x", default, 16),
    )
    assert near.sampling == Sampling(16, 0.6, 0.95, 20, 0.1) and not near.sampling.whole
    assert far.sampling == Sampling(16, 0.6) and far.sampling.whole
    with pytest.raises(ConfigurationError, match=r"`evaluation.top_p` must be above 0 and at most"):
        EvaluationSettings(top_p=1.1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "`x` must name at least one set: got none. Add a set, or remove the setting."),
        (
            {"a/b": EvalSet(ROWS)},
            "`x` must name sets with letters, digits, - and _: got 'a/b'. Rename it.",
        ),
        (
            {"a": ROWS},
            "`x.a` must be an EvalSet: got list. Give `prompts`, and the settings that differ "
            "from the others.",
        ),
        ({"a": EvalSet(ROWS, 0)}, "`x.a.samples` must be at least 1: got 0."),
        ({"a": EvalSet(ROWS, batch_size=0)}, "`x.a.batch_size` must be at least 1: got 0."),
        ({"a": EvalSet(ROWS, max_tokens=0)}, "`x.a.max_tokens` must be at least 1: got 0."),
        (
            {"a": EvalSet(ROWS, temperature=-1)},
            "`x.a.temperature` must be at least 0: got -1. 0 is greedy.",
        ),
        (
            {"a": EvalSet(ROWS, 4, temperature=0.0)},
            "`x.a.temperature` must be above 0 for 4 samples of a prompt: got 0. Greedy "
            "completions of one prompt are all equal: raise it, or set `samples` to 1.",
        ),
        (
            {"a": EvalSet(ROWS, top_p=0.0)},
            "`x.a.top_p` must be above 0 and at most 1: got 0.0. 1 samples from all tokens.",
        ),
        (
            {"a": EvalSet(ROWS, top_k=-1)},
            "`x.a.top_k` must be at least 0: got -1. 0 samples from all tokens.",
        ),
        (
            {"a": EvalSet(ROWS, min_p=1.5)},
            "`x.a.min_p` must be in [0, 1]: got 1.5. 0 samples from all tokens.",
        ),
        (
            {"a": EvalSet(ROWS, 1, 0.0, top_p=0.9, min_p=0.1)},
            "`x.a.temperature` must be above 0 with `top_p`, `min_p`: got 0. Greedy sampling takes "
            "the most likely token: raise it, or leave them out.",
        ),
        (
            {"average": EvalSet(ROWS)},
            "`x` must not name a set `average`, which stands for the mean over all sets: got a set "
            "of this name. Rename it.",
        ),
        (
            {"a": EvalSet(ROWS, 4, k=[2, 5])},
            "`x.a.k` must be in [1, 4]: got 5. Lower it, or raise `samples`.",
        ),
    ],
)
def test_what_a_set_cannot_be(given: Any, words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        named_sets(given, "x", DEFAULT, 16)
    assert str(caught.value) == words


def test_every_set_has_its_metrics_and_the_first_is_monitored(
    tmp_path: Path, student_folder: str
) -> None:
    module = make_module(student_folder, None, GRPO())
    data = make_data(val_prompts=TWO)
    near, far = make_trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    assert near == far  # Lightning gives each loader all that is logged at the end
    names = {name for name in near if name.startswith("val/near/")}
    assert {"val/near/pass_at_2", "val/near/majority_at_1", "val/near/accuracy_low"} <= names
    assert near["val/near/pass_at_1"] == near["val/near/accuracy"] == near["val/accuracy"]
    assert not [n for n in near if n.startswith("val/far/pass_at")]
    for metric in ("accuracy", "reward", "length_mean"):
        mean = (near[f"val/near/{metric}"] + near[f"val/far/{metric}"]) / 2
        assert near[f"val/average/{metric}"] == pytest.approx(mean)
    assert not {"val/average/accuracy_low", "val/average/pass_at_2"} & set(near)
    assert near["val/far/length_mean"] <= 6.0
    assert [n for n in near if n.count("/") == 1] == ["val/accuracy"]
    again = data.evaluate(module.weights())
    assert again == pytest.approx(near["val/accuracy"])
    assert data.evaluate(module.weights(), temperature=0.0) != again


def test_only_evaluations_leave_out_tokens(
    tmp_path: Path, student_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rollout that left out tokens would bias every ratio of the loss."""
    settings = EvaluationSettings(temperature=0.6, top_p=0.5, top_k=3)
    prompts = ColumnAddition(4, seed=2)
    data = make_data(val_prompts=prompts, evaluation=settings, max_tokens=20)
    trace = fit(tmp_path, make_module(student_folder, None, GRPO()), data, max_steps=2)
    assert data.collector.student.sampling.whole and data.collector.teacher.sampling.whole
    batch = trace.seen[0][1]  # the engine's log-probabilities are those of the whole distribution
    gap = (batch.rollout_logprobs - batch.old_logprobs)[batch.completion_mask]
    assert gap.abs().max() < 1e-4
    for flag in ("top_p=0.9", "top_k=5", "min_p=0.1"):
        with pytest.raises(SystemExit):
            main(["fit", f"--data.rollout.{flag}"])
        assert f"data.rollout.{flag.split('=')[0]}" in capsys.readouterr().err


def test_a_set_of_many_is_what_it_is_alone(tmp_path: Path, student_folder: str) -> None:
    def tested(sets: Any) -> dict[str, float]:
        data = make_data(test_prompts=sets)
        module = make_module(student_folder, None, GRPO())
        return dict(make_trainer(tmp_path).test(module, datamodule=data, verbose=False)[0])

    both, alone = tested(TWO), tested({"far": TWO["far"]})
    assert {n: v for n, v in both.items() if "far" in n} == {
        n: v for n, v in alone.items() if "far" in n
    }


def test_a_run_chooses_its_checkpoint_by_the_first_set(tmp_path: Path, student_folder: str) -> None:
    module = make_module(student_folder, None, GRPO())
    data = make_data(val_prompts=TWO, rollouts_per_epoch=1, max_tokens=20)
    saver, report = FSDPCheckpoint(dirpath=str(tmp_path / "kept")), RunReport(export=False)
    fit(tmp_path, module, data, [saver, report], max_steps=2, enable_checkpointing=True)
    (entry,) = saver.entries
    assert entry["score"] == report.accuracy[-1][1]
    assert entry["score"] == pytest.approx(data.evaluate(module.weights()))


def test_answers_are_the_rewards_own() -> None:
    match, sample = ExactMatch(marker="#"), Sample("so 6*7 is # 42 ", [], {"answer": "42"})
    assert answer_of(match, sample) == "42"
    assert answer_of(WeightedRewards({"match": match, "any": len}), sample) == "42"
    assert answer_of(match, Sample("no marker", [], {})) is None
    assert answer_of(lambda s: 1.0, sample) == "so 6*7 is # 42"

    class Fails:
        def __call__(self, sample: Sample) -> float:
            return 1.0

        def answer(self, sample: Sample) -> str:
            raise ValueError

    with pytest.warns(
        UserWarning, match="`answer` failed, so the completion does not vote: ValueError"
    ):
        assert answer_of(Fails(), sample) is None


def test_answers_reach_the_vote(tmp_path: Path, student_folder: str) -> None:
    """Every completion says the same in other words: the vote finds it, the text does not."""

    class First(ExactMatch):
        def __call__(self, sample: Sample) -> float:
            return float(len(sample.ids) % 2)

        def answer(self, sample: Sample) -> str | None:
            return "right" if len(sample.ids) % 2 else None

    sets = {"a": EvalSet(ColumnAddition(4, seed=2), samples=4, temperature=1.0)}
    data = make_data(val_prompts=sets, reward=First())
    module = make_module(student_folder, None, GRPO())
    (values,) = make_trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    assert values["val/a/majority_at_4"] == values["val/a/pass_at_4"] > values["val/a/accuracy"]


def test_predictions_say_where_they_are_from(tmp_path: Path, student_folder: str) -> None:
    module, data = make_module(student_folder, None, GRPO()), make_data(test_prompts=TWO)
    batches = make_trainer(tmp_path).predict(module, datamodule=data)
    rows = [row for loader in batches or [] for batch in loader for row in batch]
    assert [(r["set"], r["index"], r["sample"]) for r in rows] == [
        ("near", i, k) for i in range(5) for k in range(3)
    ] + [("far", i, 0) for i in range(3)]
    assert rows[0]["parts"] == {} and rows[0]["length"] >= 1
    assert rows[0]["answer_found"] == rows[0]["completion"].strip()


def test_metrics_survive_a_narrow_precision(tmp_path: Path, student_folder: str) -> None:
    """300 prompts: bfloat16 cannot count them."""
    data = make_data(
        val_prompts=ColumnAddition(300, seed=2), max_tokens=2, reward=lambda s: s.text < "5"
    )
    module = make_module(student_folder, None, GRPO())
    (values,) = make_trainer(tmp_path, precision="bf16-true").validate(
        module, datamodule=data, verbose=False
    )
    count = values["val/accuracy"] * 300
    assert count == pytest.approx(round(count), abs=1e-4) and 0 < count < 300
    assert torch.get_default_dtype() == torch.float32


def test_the_reward_is_tried_on_a_row_of_each_set_before_training(
    tmp_path: Path, student_folder: str
) -> None:
    def reward(sample: Sample) -> float:
        return float(sample.row["answer"])

    train = [{"prompt": "1+2=", "answer": "3"}, {"prompt": "2+2=", "answer": "4"}] * 4
    val = [{"prompt": "1+1=", "answer": "two"}]  # a row of the same kind
    data = make_data(train_prompts=train, val_prompts=val, reward=reward)
    module = make_module(student_folder, None, GRPO())
    words = r"`reward` must return a finite number: got ValueError.* of the row .*'answer': 'two'"
    with pytest.raises(ConfigurationError, match=words):
        make_trainer(tmp_path, num_sanity_val_steps=0).fit(module, datamodule=data)
    assert data.rollouts.plan is None


def test_a_model_with_fewer_rows_than_a_prompt_needs_is_not_sampled() -> None:
    """A teacher is measured on prompts that were encoded for the student."""
    source = EvaluationSource(ROWS, None, DEFAULT, 8, 0)
    encoded: Any = SimpleNamespace(sample=[({}, [3, 40]), ({}, [5])])
    source.setup("validate", lambda *_: encoded)
    words = "a prompt has the token id 40, and its embedding has 40 rows"
    assert source.refused(lambda _: [], 40) == words
    assert source.refused(lambda _: [], 41) == ""
    assert source.refused(lambda _: [(range(2, 3), "too long")], 41) == "too long"


def test_no_batch_to_train_on_is_refused(tmp_path: Path, student_folder: str) -> None:
    for limit in (0, 0.01):
        trainer = make_trainer(tmp_path, limit_train_batches=limit)
        words = rf"^`limit_train_batches` must leave an optimizer step to train: got {limit},"
        with pytest.raises(ConfigurationError, match=words):
            trainer.fit(make_module(student_folder, None, GRPO()), datamodule=make_data())
