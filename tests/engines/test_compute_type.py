"""The transformers engine's weights in the trainer's compute dtype, and its KV cache budget."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config

from helpers.engines import ids
from helpers.short_runs import fit, make_data, make_module
from kdrl_lightning import GRPO, LoRA
from kdrl_lightning.engines import Sampling, TransformersEngine
from kdrl_lightning.engines import cache_budget as budgets
from kdrl_lightning.engines.cache_budget import CacheBudget, token_bytes
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.models.weights import ModelWeights

pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")
BF16 = torch.bfloat16
PROMPTS, SEEDS = [[5, 9, 13, 4, 15], [7], [3, 4]], [[1, 2, 3], [4, 5], [6]]


class Casts(TorchDispatchMode):
    """Counts casts of tensors that are as large as a weight."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.sizes = {p.shape for p in model.parameters() if p.dim() > 1}
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype != args[0].dtype:
            self.count += args[0].shape in self.sizes
        return out


def engine_of(model: Any, folder: str, dtype: torch.dtype | None, **settings: Any) -> Any:
    engine, weights = (
        TransformersEngine(**settings),
        ModelWeights(model, folder, compute_dtype=dtype),
    )
    engine.setup(weights, 1, 0)
    engine.update_weights(weights, 0)
    return engine


def test_no_step_casts_a_weight_and_the_cache_is_narrow(
    student_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_causal_lm(student_folder)
    engine = engine_of(model, student_folder, BF16)
    kept: list[torch.dtype] = []
    way = engine._way

    class Seen(way):  # type: ignore[misc, valid-type]
        def step(self, *args: Any) -> Any:
            logits = super().step(*args)
            kept.extend(layer.keys.dtype for layer in self.cache.layers)
            return logits

    engine._way = Seen
    # As in a run: Lightning's autocast, which keeps no casts.
    with Casts(model) as casts, torch.autocast("cpu", BF16, cache_enabled=False):
        engine.generate(PROMPTS, SEEDS, Sampling(6))
    assert casts.count == 0
    assert set(kept) == {BF16}
    live = engine_of(model, student_folder, None)
    with Casts(model) as casts, torch.autocast("cpu", BF16, cache_enabled=False):
        live.generate(PROMPTS, SEEDS, Sampling(6))
    assert casts.count > 6  # what the copy saves


def test_autocast_does_not_act_on_the_copy(student_folder: str) -> None:
    engine = engine_of(load_causal_lm(student_folder), student_folder, BF16)
    without = engine.generate(PROMPTS, SEEDS, Sampling(6))
    seen: list[bool] = []
    engine._model.register_forward_pre_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    )
    with torch.autocast("cpu", BF16, cache_enabled=False):
        assert engine.generate(PROMPTS, SEEDS, Sampling(6)) == without
    assert seen and not any(seen)


def test_the_copy_follows_the_student(student_folder: str) -> None:
    model = load_causal_lm(student_folder)
    engine = engine_of(model, student_folder, BF16)
    assert not engine.exact and engine._model is not model
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    engine.update_weights(ModelWeights(model, student_folder, compute_dtype=BF16), 1)
    for name, parameter in engine._model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).bfloat16())
    wide = engine_of(model, student_folder, None)
    assert wide.exact and wide._model is model
    same = engine_of(model.bfloat16(), student_folder, BF16)
    assert same.exact and same._model is model


def test_adapters_are_merged_into_the_copy(student_folder: str) -> None:
    model = load_causal_lm(student_folder)
    LoRA(rank=2).inject(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    engine = engine_of(model, student_folder, BF16)
    for name, tensor in ModelWeights(model, student_folder).named_tensors():
        assert torch.equal(engine._model.get_parameter(name), tensor.bfloat16())


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", BF16), ("32-true", torch.float32)])
def test_a_run_samples_in_its_computing_type(
    tmp_path: Path, student_folder: str, precision: str, dtype: torch.dtype
) -> None:
    data = make_data(prompts_per_rollout=2, val_prompts=None, minibatches_per_rollout=1)
    module = make_module(student_folder, None, GRPO())
    trace = fit(tmp_path, module, data, max_steps=2, precision=precision)
    engine: Any = data.rollout_engine
    assert engine._model.dtype == dtype
    for _, batch in trace.seen:
        assert batch.engine_exact == (dtype == torch.float32)
        gap = (batch.rollout_logprobs - batch.old_logprobs).abs()[batch.completion_mask]
        assert float(gap.mean()) < 0.05


def test_an_engine_that_first_validates_can_train(tmp_path: Path, student_folder: str) -> None:
    # Lightning's default: the copy would be made of inference tensors.
    data = make_data(prompts_per_rollout=2, minibatches_per_rollout=1)
    module = make_module(student_folder, None, GRPO())
    settings: dict[str, Any] = {"precision": "bf16-mixed", "inference_mode": True}
    fit(tmp_path, module, data, max_steps=2, num_sanity_val_steps=1, **settings)
    engine: Any = data.rollout_engine
    assert not any(p.is_inference() for p in engine._model.parameters())


def test_on_a_gpu_a_run_says_how_much_faster_vllm_is(
    student_folder: str,
) -> None:
    engine = TransformersEngine()
    with warnings.catch_warnings(action="error"):
        engine.prepare(student_folder, 64, torch.device("cpu"))
    with pytest.warns(UserWarning, match="6 to 11 times the time of VLLMEngine. Add `--config eng"):
        engine.prepare(student_folder, 64, torch.device("cuda"))


def qwen3(**settings: Any) -> Qwen3Config:
    return Qwen3Config(
        num_hidden_layers=28,
        num_key_value_heads=8,
        num_attention_heads=16,
        head_dim=128,
        **settings,
    )


def test_bytes_of_a_token() -> None:
    # Qwen3-0.6B: 2 * 28 layers * 8 heads * 128 values * 2 bytes.
    assert token_bytes(qwen3(), BF16) == 114_688
    assert token_bytes(qwen3(), torch.float32) == 229_376


def test_the_budget_is_in_tokens(student_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_causal_lm(student_folder)
    assert CacheBudget(100, None).rows(model, [10, 30, 99, 1000]) == [10, 3, 1, 1]
    assert CacheBudget(100, 4).rows(model, [10, 30]) == [4, 3]
    assert CacheBudget(None, None).rows(model, [10]) == [budgets.CPU_SEQUENCES]
    each = 1.25 * token_bytes(model.config, torch.float32)
    rows = len(model.get_output_embeddings().weight)
    monkeypatch.setattr(budgets, "free_bytes", lambda _: 7.5 * (50 * each + 28 * rows))
    assert CacheBudget(None, 1000).rows(model, [50]) == [7]


def test_half_of_a_gpus_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (40 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 30 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 10 << 30)
    assert budgets.free_bytes(torch.device("cuda:1")) == 30 << 30


@pytest.mark.parametrize("tokens", [1, 20, 45, 1000])
def test_the_budget_changes_nothing_but_the_rows_at_once(student_folder: str, tokens: int) -> None:
    model = load_causal_lm(student_folder)
    wide = engine_of(model, student_folder, None, max_sequences=256)
    narrow = engine_of(model, student_folder, None, max_cached_tokens=tokens)
    seen: list[tuple[int, int]] = []
    decode = narrow._decode

    def noted(prefixes: Any, prompts: Any, chunk: Any, sampling: Any) -> Any:
        rows = sum(len(group) for _, group in chunk)
        seen.append((rows, rows * (max(map(len, prompts)) + sampling.max_tokens)))
        return decode(prefixes, prompts, chunk, sampling)

    narrow._decode = noted
    sampling = Sampling(8)
    assert ids(narrow.generate(PROMPTS, SEEDS, sampling)) == ids(
        wide.generate(PROMPTS, SEEDS, sampling)
    )
    assert all(size <= tokens or rows == 1 for rows, size in seen)
    assert len(seen) == {1: 6, 20: 5, 45: 2, 1000: 1}[tokens]


@pytest.mark.parametrize("name", ["max_sequences", "max_cached_tokens"])
def test_numbers_below_1_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"`{name}` must be at least 1: got 0"):
        TransformersEngine(**{name: 0})
