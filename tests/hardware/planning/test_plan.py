"""``plan``: its peaks are those of real steps, and its verdict follows from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist

from helpers.allocated import allocated
from helpers.planned_models import SMALL
from kdrl_lightning import (
    GRPO,
    KDRL,
    RLAD,
    AdapterOffTeacher,
    ColumnContext,
    KDRLModule,
    LocalTeacher,
    LoRA,
    PromptedTeacher,
    RolloutSettings,
    SelfTeacher,
    Teacher,
    TeacherPrompt,
)
from kdrl_lightning.__main__ import main
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.hardware.planning.cards import CARDS
from kdrl_lightning.hardware.planning.engine import pushing
from kdrl_lightning.hardware.planning.job import Job, Sampler, sampler_of
from kdrl_lightning.hardware.planning.meter import Meter
from kdrl_lightning.hardware.planning.planner import Phase, Plan, _notes, next_change, plan
from kdrl_lightning.hardware.planning.rehearsal import Rehearsal, rehearse
from kdrl_lightning.hardware.planning.report import verdict
from kdrl_lightning.objectives import Objective
from kdrl_lightning.teachers import InitialWeights, MovingAverage, TrustRegion

WEIGHTS = 512 * 64 * 2 + 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 192 + 2 * 64 + 2 * 32) + 64
BYTES = 4 * WEIGHTS
ROLLOUT = RolloutSettings(8, 4, 60)
SHOWN = ColumnContext("solution")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("small") / "config.json"
    file.write_text(json.dumps(SMALL))
    return str(file)


def job(config: str, **changes: Any) -> Job:
    settings = {"on_gpu": False, "accumulate": 2, "longest_prompt": 20, "clips": True}
    return Job(ROLLOUT, model_configs={"small": config}, **(settings | changes))


def test_a_self_teacher_is_a_second_model_unless_it_is_the_student(config: str) -> None:
    for rule, lora, models in (
        (MovingAverage(), None, 1),
        (TrustRegion(), None, 1),
        (InitialWeights(), LoRA(2), 0),
    ):
        module = KDRLModule("small", KDRL(0.3), SelfTeacher(rule), lora=lora)
        held = plan(module, job(config)).phases[2].parts
        assert held.get("teacher", 0) == pytest.approx(models * BYTES, rel=0.01)


def test_what_is_held_is_the_arithmetic_of_weights(config: str) -> None:
    module = KDRLModule("small", RLAD(ref_kl_coef=0.1), LocalTeacher("small", "bfloat16"))
    for strategy, ranks in (("ddp", 2), ("fsdp2", 4)):
        parts = replace(job(config), strategy=strategy, ranks=ranks)  # type: ignore[arg-type]
        made = plan(module, parts, cards=CARDS if strategy == "ddp" else ())
        shards = ranks if strategy == "fsdp2" else 1
        held = made.phases[3].parts
        for name, size in {
            "student": BYTES,
            "teacher": BYTES / 2,
            "reference": BYTES,
            "moments": 2 * BYTES,
            "gradients": BYTES,
        }.items():
            assert held[name] == pytest.approx(size / shards, rel=0.01), (strategy, name)
        # Of two micro-batches, fsdp2 keeps whole gradients of the first until the second.
        assert made.phases[2].parts["gradients"] == pytest.approx(BYTES, rel=0.01)
        assert held.get("ddp's buckets", 0) == (BYTES if strategy == "ddp" else 0)
        assert made.checkpoint == pytest.approx(3 * BYTES, rel=1e-3)
        if strategy == "ddp":
            assert set(made.seconds) == {card.name for card in CARDS}
            fast, slow = made.seconds["H100"], made.seconds["A100-80GB"]
            assert 0 < fast.total < slow.total
            assert slow.update / fast.update == pytest.approx(989 / 312)
    assert not dist.is_initialized() and module.student is None


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_a_real_update_allocates_what_is_planned(
    student_folder: str, recompute: bool, lora: LoRA | None
) -> None:
    def module() -> KDRLModule:
        return KDRLModule(student_folder, GRPO(), activation_checkpointing=recompute, lora=lora)

    parts = Job(RolloutSettings(8, 8, 90), on_gpu=False, accumulate=2, longest_prompt=6)
    with rehearse(module(), parts) as run:
        planned = run.update(parts.largest_micro_batch)
    real = module()
    real.trainer = pl.Trainer(accelerator="cpu", devices=1, accumulate_grad_batches=2, logger=False)
    real.configure_model()
    assert real.student is not None
    weights = [p for p in real.student.parameters() if p.requires_grad]
    real_run = Rehearsal(parts, real, Meter(), torch.optim.AdamW(weights))
    real_run.update(parts.longest)  # torch's own tables
    found = allocated(lambda: real_run.update(parts.largest_micro_batch))
    gradients = sum(p.numel() * 4 for p in weights)
    assert planned.peak + gradients == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize(
    "objective",
    [KDRL(kl_estimator="full_vocabulary"), KDRL(kl_estimator="top_k", kd_top_k=4)],
    ids=["full_vocabulary", "top_k"],
)
def test_every_kind_of_objective_is_planned(config: str, objective: Objective) -> None:
    made = plan(KDRLModule("small", objective, LocalTeacher("small")), job(config))
    assert made.phases[2].parts["activations"] > 0 and made.fits


def test_eager_attention_keeps_its_squares(config: str) -> None:
    parts = replace(job(config), rollout=RolloutSettings(8, 4, 200), longest_prompt=100)
    kept = []
    for name in ("sdpa", "eager"):
        with rehearse(KDRLModule("small", GRPO(), attn_implementation=name), parts) as run:
            kept.append(run.update(parts.longest).kept)
    squares = 2 * 2 * 300**2 * 4  # two layers of two heads
    assert 0.9 * squares < kept[1] - kept[0] < 1.1 * squares  # the softmax


def cached(made: Plan) -> float:
    return made.phases[0].parts["cache and workspace"]


def test_the_transformers_engine_fills_half_of_what_is_free_on_a_card(config: str) -> None:
    module = KDRLModule("small", GRPO())
    rollout = RolloutSettings(prompts_per_rollout=512, group_size=64, max_tokens=60)
    card = replace(job(config), rollout=rollout, on_gpu=True, accumulate=1024)
    made = plan(module, card, 1.222e9, cure=False)
    usable, cache = (1.222e9 - 1.2e9) / 1.04, cached(made)
    free = usable - (made.phases[0].total - cache)
    assert 0.25 * free < cache < 0.75 * free
    mixed = plan(module, replace(card, precision="bf16-mixed"), 1.222e9, cure=False)
    assert mixed.phases[0].parts["engine's copy"] == pytest.approx(BYTES / 2, rel=1e-3)
    fixed = replace(card, sampler=Sampler(max_sequences=8))
    assert cached(plan(module, fixed, 1.222e9, cure=False)) < cache / 10
    more = replace(card, sampler=Sampler(max_cached_tokens=80 * 32_768))
    assert plan(module, more, 1.222e9, cure=False).phases[0].total > usable


def test_what_a_cpu_keeps_of_products_in_16_bits_is_said(config: str) -> None:
    for settings, said in (
        (job(config, precision="bf16-mixed"), 1),
        (job(config), 0),
        (job(config, precision="bf16-mixed", on_gpu=True), 0),
    ):
        notes = _notes(KDRLModule("small", GRPO()), settings)
        assert sum("oneDNN" in note for note in notes) == said


def test_a_micro_batch_has_at_most_the_completions_of_a_step() -> None:
    """Every other micro-batch of the step has at least one of them."""
    rollout = RolloutSettings(8, 4, 60, max_tokens_per_micro_batch=100_000)
    card = Job(rollout, accumulate=3, longest_prompt=20)
    assert card.largest_micro_batch == (32 - 2) * 80
    small = replace(rollout, max_tokens_per_micro_batch=900)
    assert replace(card, rollout=small).largest_micro_batch == 900
    unlimited = replace(rollout, max_tokens_per_micro_batch=None)
    assert replace(card, rollout=unlimited).largest_micro_batch == 11 * 80


def test_weights_travel_in_the_type_of_the_engine_that_takes_them(tmp_path: Path) -> None:
    rows = 1 << 15  # the only weight that is large enough to be narrowed is the table of tokens
    file = tmp_path / "config.json"
    file.write_text(json.dumps(SMALL | {"vocab_size": rows, "tie_word_embeddings": True}))
    mixed = job(str(file), precision="bf16-mixed")
    with rehearse(KDRLModule("small", GRPO()), mixed) as run:
        assert pushing(run)["push buffers"] == 2 * rows * 64
        run.job = replace(mixed, sampler=Sampler("vllm", dtype="float16"))
        assert pushing(run)["push buffers"] == 2 * rows * 64
        run.job = replace(mixed, precision="32-true")  # it samples from the student itself
        assert "push buffers" not in pushing(run)


def test_the_largest_micro_batch_is_the_largest_that_fits_and_the_cure(config: str) -> None:
    module, base = KDRLModule("small", GRPO()), replace(job(config), accumulate=1)
    memory = plan(module, base).phases[2].total * 0.7
    made = plan(module, base, memory)
    assert not made.fits and made.worst.name == "update"
    assert made.largest is not None and base.longest <= made.largest < made.tokens
    assert made.cures[0].startswith("--data.rollout.max_tokens_per_micro_batch ")
    assert not module.activation_checkpointing
    with rehearse(module, base) as run:
        held = sum(run.held.values())
        assert held + run.update(made.largest).peak <= memory
        assert held + run.update(int(made.largest * 1.1)).peak > memory


def fake_plan(phase: str, memory: float = 80e9, **parts: float) -> Plan:
    """A plan that breaks in one phase, which needs 100 GB."""
    rest = {"student": 100e9 - sum(parts.values())}
    return Plan([Phase(phase, parts | rest)], memory, 4000, None, 0.0, 1, 0.0, {})


def test_each_phase_has_its_cure(config: str) -> None:
    def said(made: Plan, module: KDRLModule | None = None, **changes: Any) -> str:
        change = next_change(module or KDRLModule("small", GRPO()), job(config, **changes), made)
        return "" if change is None else change[0]

    gpu = {"on_gpu": True, "ranks": 1}
    vllm = Sampler("vllm", share=0.9, sleep=True)
    shared = fake_plan("sample", engine=72e9)
    assert said(shared, **gpu, sampler=vllm).endswith("gpu_memory_utilization 0.64")
    awake = fake_plan("update", engine=40e9)
    assert said(awake, **gpu, sampler=Sampler("vllm")).endswith("sleep true")
    cache = fake_plan("sample", **{"cache and workspace": 64e9})
    assert said(cache, **gpu, sampler=Sampler(max_cached_tokens=32)).endswith("tokens null")
    assert said(cache, **gpu, sampler=Sampler()) == ""  # it fills what is free
    assert said(fake_plan("update"), **gpu) == "--model.activation_checkpointing true"
    again = KDRLModule("small", GRPO(), activation_checkpointing=True)
    assert said(fake_plan("update"), again, **gpu) == ""
    assert said(fake_plan("step"), ranks=2, strategy="ddp") == "--trainer.strategy fsdp2"
    taught = KDRLModule("small", RLAD(), LocalTeacher("small"))
    assert said(fake_plan("step"), taught, **gpu) == "--model.teacher.init_args.offload true"
    assert said(fake_plan("step"), taught, **gpu) == ""
    own = PromptedTeacher(LocalTeacher("small"), TeacherPrompt())
    wrapped = KDRLModule("small", RLAD(), own)
    flag = "--model.teacher.init_args.teacher.init_args.offload true"
    assert said(fake_plan("step"), wrapped, **gpu) == flag


def test_a_teachers_own_prompts_are_planned(config: str) -> None:
    def scored(teacher: Teacher) -> int:
        module = KDRLModule("small", RLAD(), teacher, lora=LoRA(rank=2))
        with rehearse(module, job(config)) as run:
            batch = run._batch(100)
            return run._score(batch, run.taught(batch), batch)["teacher"].flops

    for inner in (LocalTeacher("small"), AdapterOffTeacher()):
        plain, *own = (
            scored(
                inner if n is None else PromptedTeacher(inner, TeacherPrompt(SHOWN, max_tokens=n))
            )
            for n in (None, 10, 400)
        )
        assert plain == own[0] > 0 and own[1] > 3 * plain


def test_a_run_without_a_cure_says_so() -> None:
    assert "Use more GPUs" in verdict(fake_plan("update"))
    assert "needs 100.0 GB of 80.0 GB" in verdict(fake_plan("update"))
    assert "Give `--gpu-memory`" in verdict(replace(fake_plan("update"), memory=None))


def test_a_process_group_is_refused(config: str) -> None:
    parts = replace(job(config), strategy="fsdp2", ranks=2)
    store = torch.distributed.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with (
            pytest.raises(ConfigurationError, match="must be made outside of a process group"),
            rehearse(KDRLModule("small", GRPO()), parts),
        ):
            pass
    finally:
        dist.destroy_process_group()


def test_a_job_that_does_not_divide_is_refused(config: str) -> None:
    with pytest.raises(ConfigurationError, match=r"`prompts_per_rollout` must be a multiple .* 3"):
        job(config, ranks=3)
    with pytest.raises(ConfigurationError, match=r"`accumulate_grad_batches` must be at most 32"):
        job(config, accumulate=33)


def test_the_engines_settings_are_read() -> None:
    vllm = {"class_path": "kdrl_lightning.VLLMEngine", "init_args": {"gpu_memory_utilization": 0.3}}
    assert sampler_of(vllm, True) == Sampler("vllm", share=0.3)
    assert sampler_of(None, True) == Sampler()
    assert sampler_of({"class_path": "x.VLLMServerEngine"}, True).kind == "elsewhere"
    own = {"class_path": "TransformersEngine", "init_args": {"max_sequences": 8}}
    assert sampler_of(own, True) == Sampler(max_sequences=8)
    own["init_args"] = {"max_cached_tokens": 4000}
    assert sampler_of(own, True) == Sampler(max_cached_tokens=4000)


def test_the_command_prints_a_table_and_exits_by_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    flags = ["plan", "--config", "rlad", "--prompt-tokens", "12", "--output", str(file)]
    main([*flags, "--gpus", "2", "--card", "rtx 4090"])
    out = capsys.readouterr().out
    assert "It fits: " in out and "a rollout on RTX-4090" in out and "not measured" in out
    made = json.loads(file.read_text())
    assert made["fits"] and made["phases"]["update"]["ddp's buckets"] > 0
    with pytest.raises(SystemExit) as ended:
        main([*flags, "--gpu-memory", "1.21GB"])
    assert ended.value.code == 1
    assert "It does not fit: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpu-memory", "80XB"], "`--gpu-memory` must be a number above 0"),
        (["--card", "H1000"], "`--card` must be one of"),
        (["--gpus", "0"], "`--gpus` must be at least 1: got 0"),
        (["--gpus", "many"], "the flags of `plan` must be valid: got argument --gpus"),
        (["--model-config", "x"], "`--model-config` must be NAME=FILE: got x"),
        (["--model.student", "no/model"], "got none for no/model"),
        (["--trainer.strategy", "deepspeed"], "`strategy` must be auto, ddp or fsdp2 for a plan"),
        (["--gpu", "8"], "unrecognized arguments"),
    ],
)
def test_a_mistake_is_one_line(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--config", "rlad", *flags])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
