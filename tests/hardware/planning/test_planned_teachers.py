"""What a plan counts for teachers: their weights, passes, prompts and tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.planned_models import SMALL
from kdrl_lightning import (
    GOPD,
    GRPO,
    KDRL,
    RLAD,
    AdapterOffTeacher,
    ColumnContext,
    CrossTokenizerTeacher,
    FixedContext,
    KDRLModule,
    LocalTeacher,
    LoRA,
    PromptedTeacher,
    RolloutSettings,
    RoutedTeacher,
    SelfTeacher,
    SiblingContext,
    Teacher,
    TeacherPrompt,
)
from kdrl_lightning.engines.vllm.room import needed_bytes
from kdrl_lightning.hardware.planning.engine import engine_bytes
from kdrl_lightning.hardware.planning.job import Job, Sampler
from kdrl_lightning.hardware.planning.meter import Cost
from kdrl_lightning.hardware.planning.planner import Counted, _of_tokens, at_full_depth, plan
from kdrl_lightning.hardware.planning.rehearsal import Rehearsal, rehearse
from kdrl_lightning.hardware.planning.seconds import work_of
from kdrl_lightning.hardware.planning.teachers.own_prompts import own_prompts_of, tokens_per_token
from kdrl_lightning.teachers import HardSync, InitialWeights, MovingAverage, TrustRegion
from kdrl_lightning.teachers.frozen import FrozenModels

MODEL = SMALL | {"max_position_embeddings": 4096}
ROLLOUT = RolloutSettings(8, 4, 60)
WHOLE = KDRL(kl_estimator="full_vocabulary")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Two micro-batches of 16 completions of 80 tokens, on a CPU."""
    folder = tmp_path_factory.mktemp("configs")
    kinds: dict[str, dict[str, Any]] = {
        "small": {},
        "wide": {"hidden_size": 128},
        "deep": {"num_hidden_layers": 12},
    }
    files = {}
    for name, changes in kinds.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(MODEL | changes))
        files[name] = str(file)
    return Job(ROLLOUT, on_gpu=False, accumulate=2, longest_prompt=20, model_configs=files)


def test_a_trust_region_runs_both_students_and_one_head_of_both_widths(job: Job) -> None:
    found = []
    for rule in (MovingAverage(), TrustRegion(0.5)):
        with rehearse(KDRLModule("small", KDRL(0.3), SelfTeacher(rule)), job) as run:
            found.append(run.score(job.longest)["teacher"])
            assert run.held["teacher"] == pytest.approx(run.held["student"], rel=0.01)
    one, both = found
    assert both.flops == pytest.approx(2 * one.flops, rel=0.01)
    joined = 512 * 2 * 64 * 4  # bytes of the joined head
    assert both.peak - one.peak > 0.9 * joined


def test_a_checkpoint_holds_the_weights_that_follow_the_student(job: Job) -> None:
    def saved(teacher: Teacher | None) -> float:
        objective = GRPO() if teacher is None else KDRL(0.3)
        with rehearse(KDRLModule("small", objective, teacher), job) as run:
            return run.checkpoint()

    plain = saved(None)
    assert saved(SelfTeacher(InitialWeights())) == plain
    for rule in (MovingAverage(), HardSync(2)):
        assert saved(SelfTeacher(rule)) == pytest.approx(plain * 4 / 3, rel=1e-3)


def only_work(run: Rehearsal) -> Counted:
    return Counted([], [], 0, 0, work_of(run), [])


def test_a_teacher_of_the_students_weights_is_as_deep_as_the_student(job: Job) -> None:
    def scored(teacher: Teacher) -> float:
        module = KDRLModule("deep", KDRL(0.3), teacher, lora=LoRA(rank=2))
        return at_full_depth(module, job, only_work).work.score

    own, local = scored(AdapterOffTeacher()), scored(LocalTeacher("deep"))
    assert own == pytest.approx(local, rel=0.05)


def test_a_configured_reference_is_planned_instead_of_the_first_student(job: Job) -> None:
    def held(reference: Teacher | None) -> int:
        module = KDRLModule("small", GOPD(), LocalTeacher("small"), reference=reference)
        with rehearse(module, job) as run:
            assert run.score(job.longest)["reference"].flops > 0
            return run.held["reference"]

    assert held(LocalTeacher("wide")) > 1.5 * held(None) > 0


def test_an_offloaded_teacher_that_updates_read_stays_on_the_card(job: Job) -> None:
    card = replace(job, on_gpu=True)
    for objective, stays in ((KDRL(), False), (WHOLE, True)):
        made = plan(KDRLModule("small", objective, LocalTeacher("wide", offload=True)), card)
        parts = made.phases[2].parts
        assert ("offloaded teacher" in parts) is stays and not parts.get("teacher")


def test_an_offloaded_teacher_waits_where_everything_is_on_a_cpu(job: Job) -> None:
    held = []
    for offload in (False, True):
        with rehearse(KDRLModule("small", KDRL(), LocalTeacher("wide", offload=offload)), job) as r:
            held.append((r.held["teacher"], r.away))
    assert held[0] == held[1] and held[0][0] > 0


def test_scoring_with_an_offloaded_teacher_is_its_weights_with_its_pass(job: Job) -> None:
    with rehearse(
        KDRLModule("small", KDRL(), LocalTeacher("wide", offload=True)), replace(job, on_gpu=True)
    ) as run:
        costs = {"student": Cost(run.away + 7), "teacher": Cost(8)}
        run.score = lambda tokens: costs  # type: ignore[method-assign]
        parts = _of_tokens(run, job.longest, {})[0].parts
    assert (parts["offloaded teacher"], parts["workspace"]) == (run.away, 8)


def test_models_whose_scores_the_updates_give_do_not_score_before(job: Job) -> None:
    vllm, twice = Sampler("vllm"), replace(job.rollout, epochs_per_rollout=2)
    with rehearse(KDRLModule("small", KDRL(), LocalTeacher("small")), job) as run:
        for settings, objective, shares in (
            (job, KDRL(), (0, 1)),
            (job, WHOLE, (0, 0)),
            (replace(job, sampler=vllm), KDRL(), (1, 1)),  # its scores are not exact
            (replace(job, rollout=twice), WHOLE, (1, 1)),
        ):
            run.job, run.module.objective = settings, objective
            found = run.shares(run._batch(job.longest))
            assert (found["student"], found["teacher"]) == shares
        run.job = job
        assert set(run.score(job.longest)) == {"reference"}


def length(prompt: TeacherPrompt, job: Job, **changes: Any) -> tuple[int, bool, str]:
    module = KDRLModule("small", RLAD(), PromptedTeacher(LocalTeacher("small"), prompt))
    own = own_prompts_of(module, replace(job, **changes), None)
    assert own is not None
    return own.tokens, own.differ, own.note


def test_the_length_of_a_teachers_prompt_follows_from_what_it_shows(job: Job) -> None:
    assert length(TeacherPrompt(prefix="<think></think>"), job) == (25, False, "")
    assert length(TeacherPrompt(FixedContext("Be brief, please.")), job) == (27, False, "")
    # A sibling is as long as a completion may be.
    assert length(TeacherPrompt(SiblingContext()), job) == (81, True, "")
    tokens, differ, note = length(TeacherPrompt(ColumnContext("solution")), job)
    assert (tokens, differ) == (81, False)
    assert "as long as a completion; `--teacher-prompt-tokens` sets" in note
    limited = TeacherPrompt(ColumnContext("solution"), max_tokens=300)
    assert length(limited, job) == (300, False, "")
    assert length(limited, job, teacher_prompt=50)[0] == 50
    # The teacher's context of 4,096 tokens has room for prompt and completion.
    assert length(TeacherPrompt(SiblingContext()), job, longest_prompt=4090)[0] == 4036


def test_updates_that_run_the_teacher_run_its_prompts(job: Job) -> None:
    def trained(teacher: Teacher) -> int:
        with rehearse(KDRLModule("small", WHOLE, teacher), job) as run:
            return run.update(job.longest).flops

    inner = LocalTeacher("small")
    shown = PromptedTeacher(inner, TeacherPrompt(ColumnContext("x"), max_tokens=1000))
    assert trained(shown) > 2 * trained(inner)


@pytest.mark.parametrize("share", [None, 2.0])
def test_a_pass_of_the_teacher_keeps_the_limit_in_its_own_tokens(
    job: Job, share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FrozenModels, "joins", False)
    inner = PromptedTeacher(LocalTeacher("wide"), TeacherPrompt(ColumnContext("x"), max_tokens=100))
    teacher = inner if share is None else CrossTokenizerTeacher(inner)
    limited = replace(
        job, rollout=replace(ROLLOUT, max_tokens_per_micro_batch=640), teacher_tokens=share
    )
    own = 100 + 60 if share is None else 2 * (100 + 60)
    with rehearse(KDRLModule("small", RLAD(), teacher), limited) as run:
        batch = run._batch(640)
        assert len(batch) == 640 // 80
        assert len(run._largest_read(batch, 640)) == 640 // own
        assert len(run._largest_read(run._batch(80), 80)) == 1  # one row may be longer
        run.job = job  # without a limit, the teacher reads as many rows as the student
        assert len(run._largest_read(batch, 640)) == len(batch)


def test_another_tokenizers_tokens_are_counted(job: Job, student_folder: str) -> None:
    teacher = CrossTokenizerTeacher(LocalTeacher("wide"))
    module = KDRLModule("small", RLAD(), teacher)
    assert tokens_per_token(module, job)[0] == 1.25
    assert "`--teacher-tokens` sets it" in tokens_per_token(module, job)[1]
    flops = []
    for share in (1.0, 2.0):
        module = KDRLModule("small", RLAD(), teacher)
        with rehearse(module, replace(job, teacher_tokens=share)) as run:
            batch = run._batch(job.longest)
            flops.append(run._score(batch, run.taught(batch), batch)["teacher"].flops)
            # Updates of chunks wait for all their tokens.
            assert run.filled(batch).chunk_places is not None
            assert run.update(job.longest).flops > 0
    assert flops[1] == pytest.approx(2 * flops[0], rel=0.1)
    # A teacher that is still to be trained.
    later = CrossTokenizerTeacher(LocalTeacher("runs/not/there"))
    assert tokens_per_token(KDRLModule(student_folder, RLAD(), later), job)[0] == 1.25
    # One vocabulary: its tokens are the student's.
    same = CrossTokenizerTeacher(LocalTeacher(student_folder))
    assert tokens_per_token(KDRLModule(student_folder, RLAD(), same), job) == (None, "")


def test_routed_teachers_are_all_held_and_the_largest_scores(job: Job) -> None:
    def planned(teacher: Teacher) -> tuple[int, int]:
        with rehearse(KDRLModule("small", KDRL(), teacher), job) as run:
            return run.held["teacher"], run.score(job.longest)["teacher"].flops

    (small, _), (wide, flops) = (planned(LocalTeacher(name)) for name in ("small", "wide"))
    both = RoutedTeacher({"a": LocalTeacher("wide"), "b": LocalTeacher("small")})
    assert planned(both) == (small + wide, flops)


def test_vllms_share_is_refused_with_the_figure_of_the_plan(job: Job, tmp_path: Path) -> None:
    config = json.loads(Path(job.model_configs["small"]).read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    card = replace(job, on_gpu=True, sampler=Sampler("vllm"))
    with rehearse(KDRLModule("small", GRPO()), card) as run:
        planned = engine_bytes(run, None)
    assert planned == needed_bytes(str(tmp_path), torch.bfloat16, job.longest, None)
