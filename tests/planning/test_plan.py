"""``plan``: its peaks are those of real steps, its verdict follows from them, mistakes are a line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kdrl_lightning import GKD, GRPO, KDRL, RLAD, KDRLModule, LocalTeacher, LoRA, RolloutSettings
from kdrl_lightning.__main__ import main
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.objectives import Objective
from kdrl_lightning.planning.cards import CARDS
from kdrl_lightning.planning.job import Job, Sampler, sampler_of
from kdrl_lightning.planning.planner import CONTEXT, GAPS, plan
from kdrl_lightning.planning.rehearsal import rehearse

SMALL = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "tie_word_embeddings": False,
}
WEIGHTS = 512 * 64 * 2 + 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 192 + 2 * 64 + 2 * 32) + 64
BYTES = 4 * WEIGHTS
ROLLOUT = RolloutSettings(8, 4, 60)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("small") / "config.json"
    file.write_text(json.dumps(SMALL))
    return str(file)


def job(config: str, **changes: Any) -> Job:
    settings = {"on_gpu": False, "accumulate": 2, "longest_prompt": 20, "clips": True}
    return Job(ROLLOUT, model_configs={"small": config}, **(settings | changes))


def test_what_is_held_is_the_arithmetic_of_weights(config: str) -> None:
    module = KDRLModule("small", RLAD(ref_kl_coef=0.1), LocalTeacher("small", "bfloat16"))
    for strategy, ranks in (("single", 1), ("ddp", 2), ("fsdp2", 4)):
        parts = replace(job(config), strategy=strategy, ranks=ranks)  # type: ignore[arg-type]
        made = plan(module, parts)
        shards = ranks if strategy == "fsdp2" else 1
        held = made.phases[2].parts
        for name, size in {
            "student": BYTES,
            "teacher": BYTES / 2,
            "reference": BYTES,
            "moments": 2 * BYTES,
            "gradients": BYTES,
        }.items():
            assert held[name] == pytest.approx(size / shards, rel=0.01), (strategy, name)
        assert ("ddp's buckets" in held) == (strategy == "ddp")
        assert made.checkpoint == pytest.approx(3 * BYTES, rel=1e-3)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    "objective",
    [GRPO(), KDRL(kl_estimator="full_vocabulary"), KDRL(kl_estimator="top_k", kd_top_k=4), GKD()],
    ids=lambda objective: type(objective).__name__,
)
def test_every_kind_of_objective_is_planned(config: str, objective: Objective) -> None:
    teacher = None if isinstance(objective, GRPO) else LocalTeacher("small")
    made = plan(KDRLModule("small", objective, teacher), job(config))
    assert made.phases[2].parts["activations"] > 0 and made.fits


def test_checkpointing_and_lora_save_what_they_promise(config: str) -> None:
    plain = plan(KDRLModule("small", GRPO()), job(config))
    again = plan(KDRLModule("small", GRPO(), activation_checkpointing=True), job(config))
    adapters = plan(KDRLModule("small", GRPO(), lora=LoRA(rank=2)), job(config))
    kept = [made.phases[2].parts["activations"] for made in (plain, again)]
    assert kept[1] < kept[0] / 3
    assert adapters.phases[2].parts["moments"] < 0.2 * plain.phases[2].parts["moments"]
    assert adapters.checkpoint < 0.2 * plain.checkpoint


def test_the_largest_micro_batch_is_the_largest_that_fits(config: str) -> None:
    module, base = KDRLModule("small", GRPO()), replace(job(config), accumulate=1)
    whole = plan(module, base)
    memory = whole.phases[2].total * 0.7
    made = plan(module, base, memory, cure=False)
    assert not made.fits and made.worst.name == "update"
    assert made.largest is not None and base.longest <= made.largest < made.tokens
    for tokens, fits in ((made.largest, True), (int(made.largest * 1.1), False)):
        rollout = replace(ROLLOUT, max_tokens_per_micro_batch=tokens)
        size = plan(module, replace(base, rollout=rollout)).phases[2].total
        assert (size <= memory) == fits


def test_cures_are_planned_before_they_are_named(config: str) -> None:
    module, base = KDRLModule("small", GRPO()), replace(job(config), accumulate=1)
    whole = plan(module, base)
    made = plan(module, base, whole.phases[2].total * 0.7)
    assert len(made.cures) == 1
    assert made.cures[0].startswith("--data.rollout.max_tokens_per_micro_batch ")
    assert not module.activation_checkpointing
    none = plan(module, base, 1000.0)
    assert not none.fits and none.largest is None and none.cures == []


@pytest.mark.parametrize(
    ("sampler", "cure"),
    [
        (Sampler("vllm", share=0.9, sleep=True), "gpu_memory_utilization"),
        (Sampler("vllm", share=0.5), "sleep true"),
        (Sampler(max_sequences=32), "max_sequences"),
    ],
)
def test_an_engine_without_room_is_named_with_its_cure(
    config: str, sampler: Sampler, cure: str
) -> None:
    base = job(config, on_gpu=True, sampler=sampler)
    # A card on which the update fits and the engine does not.
    update = plan(KDRLModule("small", GRPO()), replace(base, sampler=Sampler("elsewhere")))
    room = {"sleep true": 1.3, "gpu_memory_utilization": 1.5, "max_sequences": 1.02}[cure]
    memory = CONTEXT + (1 + GAPS) * room * update.worst.total
    if sampler.kind == "vllm":  # its part is one of the whole card, which is mostly context here
        base = replace(
            base, sampler=replace(sampler, share=sampler.share * update.worst.total * 1.2 / memory)
        )
    made = plan(KDRLModule("small", GRPO()), base, memory)
    assert not made.fits and any(cure in text for text in made.cures), made


def test_seconds_are_given_for_every_card(config: str) -> None:
    made = plan(KDRLModule("small", RLAD(), LocalTeacher("small")), job(config), cards=CARDS)
    assert set(made.seconds) == {card.name for card in CARDS}
    fast, slow = made.seconds["H100"], made.seconds["A100-80GB"]
    assert 0 < fast.total < slow.total
    assert slow.update / fast.update == pytest.approx(989 / 312)


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
        (["--gpus", "many"], "the flags of `plan` must be right: got argument --gpus"),
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
