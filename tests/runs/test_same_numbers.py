"""One process, two under ddp and two under fsdp2 take the same steps on the same global batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.processes.strategy_runs import Runs
from kdrl_lightning.cli.export import export

two = pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
EXACT = ("kdrl", "rlad", "gkd", "routed", "mixed", "lora", "average")


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Relative, over all tensors, in float64."""
    assert ours.keys() == theirs.keys()
    a, b = (torch.cat([t[n].double().flatten() for n in sorted(ours)]) for t in (ours, theirs))
    assert a.norm() > 0
    return float((a - b).norm() / a.norm())


def change(seen: dict[str, Any], start: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() - start[name] for name, tensor in seen["weights"].items()}


def completions(seen: dict[str, Any]) -> list[Any]:
    return sorted(row for rank in seen["ranks"] for row in rank["completions"])


@two
@pytest.mark.parametrize("case", [*EXACT, "kdrl32", "sick"])
def test_completions_losses_and_statistics_are_the_same(runs: Runs, strategy: str, case: str):
    one, both = runs("auto", case), runs(strategy, case)
    assert completions(one) == completions(both)
    # Statistics of clips and histograms are kept in float32.
    bound = 1e-5 if case == "kdrl32" else 1e-6
    # What a step costs depends on how it is laid out.
    costs = ("time/", "memory/", "tokens_per_s", "rollout/padding_frac")
    for a, b in zip(one["logged"], both["logged"], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if not name.startswith(costs):
                near = pytest.approx(b[name], rel=bound, abs=bound, nan_ok=True)
                assert a[name] == near, name
    assert len(one["imitation"]) == len(both["imitation"]) == 2
    # Each rank saw some of the parts of the rewards; all are logged.
    assert sum(name.startswith("reward/begins_with_") for name in both["logged"][-1]) > 2
    assert both["logged"][0]["reward/odd_mean"] == pytest.approx(both["logged"][0]["reward/mean"])


@two
@pytest.mark.parametrize("case", [*EXACT, "kdrl32"])
def test_gradients_and_weights_are_the_same(runs: Runs, strategy: str, case: str):
    one, both = runs("auto", case), runs(strategy, case)
    bound = 1e-5 if case == "kdrl32" else 1e-10
    assert len(one["gradients"]) == len(both["gradients"]) == 4
    for ours, theirs in zip(one["gradients"], both["gradients"], strict=True):
        assert distance(ours, theirs) <= bound
    start = load_file(runs.folder / "student/model.safetensors")
    assert distance(change(one, start), change(both, start)) <= bound


@two
def test_the_teachers_completions_are_measured(runs: Runs, strategy: str):
    names = runs(strategy, "mixed")["logged"][-1].keys()
    assert {"loss/teacher_kl", "kd/imitated_groups_frac", "teacher/reward_mean"} <= names


@two
def test_every_kind_of_objective_takes_the_same_steps(runs: Runs, strategy: str):
    one, both = runs("auto", "family"), runs(strategy, "family")
    assert one.keys() == both.keys() and len(one) == 15
    start = load_file(runs.folder / "student/model.safetensors")
    for name in one:
        assert one[name]["losses"] == pytest.approx(both[name]["losses"], rel=1e-10), name
        assert distance(change(one[name], start), change(both[name], start)) <= 1e-10, name


@two
def test_teachers_with_their_own_prompts_take_the_same_steps(runs: Runs, strategy: str):
    one, both = runs("auto", "prompted"), runs(strategy, "prompted")
    assert one.keys() == both.keys() and len(one) == 9
    start = load_file(runs.folder / "student/model.safetensors")
    for name in one:
        assert one[name]["losses"] == pytest.approx(both[name]["losses"], rel=1e-10), name
        assert distance(change(one[name], start), change(both[name], start)) <= 1e-10, name
        assert one[name]["context"] == both[name]["context"] > 0, name


@two
def test_the_hard_shapes_are_among_them(runs: Runs, strategy: str):
    ranks = runs(strategy, "kdrl")["ranks"]
    assert len(ranks) == 2
    lengths = {len(ids) for rank in ranks for _, ids, _ in rank["completions"]}
    assert len(lengths) > 5
    # [rollout][micro-batch]: one that is fully masked on one rank alone.
    pairs = [p for r in range(2) for p in zip(*(rank["masked"][r] for rank in ranks), strict=True)]
    assert (True, False) in pairs or (False, True) in pairs
    assert any(a != b for a, b in zip(*(rank["flat"] for rank in ranks), strict=True))


def test_scores_that_only_some_ranks_have_to_compute_are_the_same(runs: Runs):
    before, after = runs("fsdp2", "routed"), runs("fsdp2", "half")
    for rank in after["ranks"]:
        hits, misses = rank["found"]
        assert hits > 0 and misses > 0
    assert completions(before) == completions(after)
    assert distance(before["weights"], after["weights"]) <= 1e-12


@two
def test_a_gradient_that_is_nan_on_one_rank_is_skipped_by_all(runs: Runs, strategy: str):
    one, both = runs("auto", "sick"), runs(strategy, "sick")
    assert one["skipped"] == both["skipped"] == 1
    sick = both["gradients"][1].values()
    assert any(bool(gradient.isnan().any()) for gradient in sick)
    start = load_file(runs.folder / "student/model.safetensors")
    assert distance(change(one, start), change(both, start)) <= 1e-10


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2"])
def test_a_lora_student_goes_on_byte_for_byte(runs: Runs, strategy: str):
    whole, rest = runs(strategy, "lora"), runs(strategy, "lora_resumed")
    assert (len(whole["gradients"]), len(rest["gradients"])) == (4, 2)
    for ours, theirs in zip(whole["gradients"][2:], rest["gradients"], strict=True):
        assert all(".lora_" in name for name in ours)
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert all(torch.equal(t, rest["weights"][name]) for name, t in whole["weights"].items())


def test_a_moving_average_goes_on_byte_for_byte_on_two_ranks(runs: Runs):
    whole, rest = runs("fsdp2", "average"), runs("fsdp2", "average_resumed")
    assert (len(whole["gradients"]), len(rest["gradients"])) == (4, 2)
    assert len(whole["kept"]) == len(whole["weights"])
    for found in ("weights", "kept"):
        assert all(torch.equal(t, rest[found][name]) for name, t in whole[found].items())
    for strategy in ("auto", "ddp"):
        assert distance(whole["kept"], runs(strategy, "average")["kept"]) <= 1e-10
    # It is neither the student's start nor its end.
    ends = whole["weights"]["lm_head.weight"], load_file(runs.folder / "student/model.safetensors")
    kept = whole["kept"]["0.model.lm_head.weight"]
    assert 0 < (kept - ends[0]).norm() < (ends[1]["lm_head.weight"] - ends[0]).norm()


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_a_lora_students_checkpoint_becomes_its_export(runs: Runs, strategy: str, tmp_path: Path):
    seen = runs(strategy, "lora")
    start = runs.folder / "student"
    made = runs.folder / strategy / "lora_checkpoints/step=00000004.ckpt"
    export(str(made), str(tmp_path / "whole"))
    ours, theirs = (load_file(f / "model.safetensors")
                    for f in (tmp_path / "whole", runs.folder / strategy / "lora"))  # fmt: skip
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    moved = {n for n, t in change(seen, load_file(start / "model.safetensors")).items() if t.any()}
    assert {n.split(".")[-2] for n in moved} == {"q_proj", "v_proj", "dense", "fc1"}


def test_a_lora_student_in_bf16_mixed_keeps_float32_adapters(runs: Runs):
    seen = runs("fsdp2", "lora_bf16")
    assert {t.dtype for t in seen["weights"].values()} == {torch.float32}
    assert {t.dtype for g in seen["gradients"] for t in g.values()} == {torch.float32}
    # The engine samples from merged weights.
    assert seen["logged"][-1]["rollout/logprob_diff_max"] < 0.1
    assert seen["logged"][-1]["loss/ref_kl"] > 0


def test_fsdp2_splits_the_student(runs: Runs):
    whole, part = runs("ddp", "kdrl")["bytes"], runs("fsdp2", "kdrl")["bytes"]
    assert whole == runs("auto", "kdrl")["bytes"]
    assert whole / 2 <= part < 0.51 * whole  # rank 0 has the larger part of odd sizes


@pytest.mark.parametrize("case", ["kdrl", "kdrl32"])
def test_export_is_the_one_of_a_single_process(runs: Runs, case: str):
    folders = [runs.folder / strategy / case for strategy in ("auto", "fsdp2")]
    names = [sorted(p.name for p in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(names[0])
    assert (folders[0] / "config.json").read_text() == (folders[1] / "config.json").read_text()
    ours, theirs = (load_file(folder / "model.safetensors") for folder in folders)
    assert distance(ours, theirs) <= (1e-5 if case == "kdrl32" else 1e-10)
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}


def test_bf16_mixed_keeps_float32_masters(runs: Runs):
    mixed, exact = runs("fsdp2", "bf16"), runs("fsdp2", "kdrl32")
    assert {t.dtype for t in mixed["weights"].values()} == {torch.float32}
    assert {t.dtype for g in mixed["gradients"] for t in g.values()} == {torch.float32}
    assert mixed["bytes"] == exact["bytes"]
    start = load_file(runs.folder / "student/model.safetensors")
    assert change(mixed, start)["lm_head.weight"].norm() > 0
    # The engine samples under the same autocast as the trainer scores.
    assert mixed["logged"][-1]["rollout/logprob_diff_max"] < 0.1


@pytest.mark.parametrize(
    ("strategy", "case", "words"),
    [
        ("ddp", "failing", "the reward failed on"),
        ("ddp", "stale", "the engine's log-probabilities must agree"),
        ("fsdp2", "stale", "the engine's log-probabilities must agree"),
        ("fsdp2", "choosy", "sampled tokens must be among the teacher's"),
    ],
)
def test_what_stops_one_rank_stops_all(runs: Runs, strategy: str, case: str, words: str):
    first, last = runs(strategy, case)["reasons"]
    assert first.startswith("another process had to stop")
    assert last.startswith(words)
