"""Checks that vLLM samples from students of an architecture with the right log-probabilities.

    OMP_NUM_THREADS=1 python -m benchmarks.architectures.vllm_case qwen3 mixtral smollm3

writes ``docs/architectures/vllm.json``, with a process per family; ``run.py`` does so for the whole
table, and writes its page. All runs use float32 and random weights, and check that:

1. The comparison that a run makes before its first rollout accepts the engine.
2. The engine's log-probabilities of its samples agree with the model's logits to 1e-4; the table
   states a larger difference. Above 1e-3 on average, ``WeightSyncCheck`` would stop the run.
3. They agree again after all weights have changed and were pushed, and not before the push.
4. The student gives the same numbers, bit for bit, as before the engine existed.

Models, engines and their weights are ``Any``: transformers and vLLM have no common types.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
RESULTS = Path(__file__).parents[2] / "docs/architectures/vllm.json"
END, PAD = 1, 0
# The last one is longer than Llama 4's chunk below.
PROMPTS = [
    [5, 9, 13, 4, 15],
    [7],
    [3, 14, 3, 3],
    [12, 11, 10] * 5,
    [2 + i % 89 for i in range(140)],
]
SEEDS = [[100 * i + j for j in range(3)] for i in range(len(PROMPTS))]
BOUND = 1e-4
CONTEXT = 192

# vLLM's CPU kernels take heads of 32, 64, 80, ... values.
WIDE: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "word_embed_proj_dim"], 128),
    **dict.fromkeys(["head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"], 32),
    **dict.fromkeys(["query_pre_attn_scalar", "kv_channels"], 32),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], 128),
}
# 512 and 64 are the only sizes of latent attention that CPU kernels are compiled for.
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
INDEXED = {**LATENT, "index_head_dim": 128}
# vLLM needs whole blocks of 128 tokens, and one expert of a token, as in published models.
LLAMA_4 = {"attention_chunk_size": 128, "num_experts_per_tok": 1}
GEMMA_4 = {"num_experts": None, "global_head_dim": 64}  # 64: no larger than its default
# vLLM reads the configuration of Gemma 4's images even for text alone; transformers has no default.
EYES = {
    **dict.fromkeys(["hidden_size", "intermediate_size"], 64),
    **dict.fromkeys(["num_hidden_layers", "num_attention_heads", "num_key_value_heads"], 1),
    "head_dim": 64,
}
# Further settings, some of which published models have and transformers' defaults lack.
SPECIAL: dict[str, dict[str, Any]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "axk1": LATENT,
    "axk2": INDEXED,
    "bamba": {"mamba_n_heads": 8},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 6, 4]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": {**LATENT, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "deepseek_v32": INDEXED,
    "deepseek_v4": {"qk_rope_head_dim": 64, "index_head_dim": 128},
    "dots1": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "falcon": {"ffn_hidden_size": 512},  # vLLM supports only four times the width
    "gemma4": {"vision_config": EYES, "text_config": GEMMA_4},
    "gemma4_text": GEMMA_4,
    "gemma4_unified": {"vision_config": EYES, "text_config": GEMMA_4},
    "glm4_moe": {"head_dim": 32},
    "glm4_moe_lite": {**LATENT, "first_k_dense_replace": 1},
    "glm_moe_dsa": INDEXED,
    "granitemoehybrid": {"mamba_n_heads": 8},
    "hy_v3": {
        "first_k_dense_replace": 1,
        "expert_hidden_dim": 32,
        **dict.fromkeys(["route_norm", "qk_norm"], True),
    },
    "hy_v4": {"index_head_dim": 64},
    "lfm2": {"conv_dim": 128, "block_dim": 128},
    "lfm2_moe": {"conv_dim": 128},
    "llama4": {"text_config": LLAMA_4},
    "llama4_text": LLAMA_4,
    "longcat_flash": {
        **LATENT,
        "head_dim": 64,
        **dict.fromkeys(["mla_scale_q_lora", "mla_scale_kv_lora"], True),
        "zero_expert_type": "identity",
    },
    "mamba2": {"num_heads": 8, "head_dim": 32},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 1, 1],
        "moe_layer_freq": [0, 1, 1, 1],
        "layernorm_epsilon": 1e-5,
        "sliding_window_size": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 32,
    },
    "minimax_m2": {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True},
    "qwen4_exp": {"text_config": {"indexer_head_dim": 32}},
    "qwen4_exp_text": {"indexer_head_dim": 32},
    "youtu": LATENT,
    "zamba2": {"n_mamba_heads": 8},
}


class WrongError(AssertionError):
    """Raised if numbers differ from the student's."""


def settings(model_type: str) -> dict[str, Any]:
    """Return the sizes that vLLM's kernels need, for the fields that the type has."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from benchmarks.architectures.families import merged

    return merged(wide(CONFIG_MAPPING[model_type]().to_dict()), SPECIAL.get(model_type, {}))


def wide(known: dict[str, Any]) -> dict[str, Any]:
    """Return wider sizes for the fields of a configuration and of the text model inside it."""
    derived = {"head_dim"} if "qk_rope_head_dim" in known else set()
    chosen = {name: WIDE[name] for name in WIDE.keys() & known.keys() - derived}
    if isinstance(known.get("text_config"), dict):
        chosen["text_config"] = wide(known["text_config"])
    return chosen


@torch.no_grad()
def logprobs(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Return ``[T]`` log-probabilities of a completion from the model's logits, each row alone."""
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
    chosen = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
    return chosen.gather(1, torch.tensor(completion)[:, None])[:, 0]


def gaps(model: Any, groups: list[list[Any]]) -> torch.Tensor:
    """Return ``[N]`` differences of the engine's log-probabilities from the model's, by token."""
    rows = [(p, c) for p, group in zip(PROMPTS, groups, strict=True) for c in group]
    return torch.cat([torch.tensor(c.logprobs) - logprobs(model, p, c.ids) for p, c in rows]).abs()


@torch.no_grad()
def change(model: Any) -> None:
    """Move every weight and stored buffer by about a third of its tensor's spread."""
    torch.manual_seed(1)
    for tensor in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values():
        if tensor.is_floating_point():
            spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
            tensor += (0.3 * spread or 0.02) * torch.randn_like(tensor)


def check(model_type: str) -> str:
    """Try an architecture in this process, which must have no engine yet.

    It uses float32, or bfloat16 if vLLM's CPU kernels for the architecture support only that.

    Returns:
        ``yes``, with the difference if it is above 1e-4; or ``refused: `` and the reason.

    Raises:
        WrongError: numbers differ from the student's.
    """
    os.environ.update(ENVIRONMENT)  # vLLM reads it when it is imported
    from benchmarks.architectures.families import merged, save

    with tempfile.TemporaryDirectory() as folder:
        sizes = settings(model_type)
        path = save(model_type, folder, **sizes)
        found = attempt(path, "float32")
        if "BF16" in found:
            # Rounding moves log-probabilities by less if weights are smaller.
            small = {"initializer_range": 0.05}
            parts = {name: small for name in sizes if name.endswith("_config")}
            path = save(model_type, folder, **merged(sizes, {**small, **parts}))
            found = attempt(path, "bfloat16")
        return found.replace(path, model_type)


def attempt(path: str, dtype: Any) -> str:
    """Try the model of a folder; see ``check``."""
    from kdrl_lightning.engines import VLLMEngine
    from kdrl_lightning.errors import ConfigurationError, TrainingStopped
    from kdrl_lightning.models.loading import load_causal_lm
    from kdrl_lightning.models.scorer import Scorer
    from kdrl_lightning.models.weights import ModelWeights

    try:
        model = load_causal_lm(path)
        Scorer(model).verify(path)  # chooses the attention that gives the right numbers
        engine = VLLMEngine(max_model_len=CONTEXT, kv_cache_memory_bytes=64 << 20, dtype=dtype)
        before = [logprobs(model, p, [20, 30, 40, 50, 60]) for p in PROMPTS]
        engine.setup(ModelWeights(model, path), END, PAD)
        return compare(engine, ModelWeights(model, path), before)
    except (ConfigurationError, TrainingStopped) as error:
        return f"refused: {error}"


def compare(engine: Any, weights: Any, before: list[torch.Tensor]) -> str:
    """Compare an engine with the model of ``weights``, before and after all weights change."""
    from kdrl_lightning.engines import Sampling
    from kdrl_lightning.engines.agreement import bound_of

    as_a_run_does(engine, weights)
    model, groups, worst, mean = weights.model, [], 0.0, 0.0
    for version in (0, 1):
        if version:
            change(model)
            stale = float(gaps(model, groups).mean())
            if not stale > max(10 * mean, 1e-5):
                raise WrongError(f"a change of all weights moves log-probabilities by {stale:.1e}")
        engine.update_weights(weights, version)
        groups = engine.generate(PROMPTS, SEEDS, Sampling(12))
        apart = gaps(model, groups)
        worst, mean = max(worst, float(apart.max())), max(mean, float(apart.mean()))
        after = [logprobs(model, p, [20, 30, 40, 50, 60]) for p in PROMPTS]
        if version == 0 and not all(map(torch.equal, before, after)):
            raise WrongError("the engine changes the student")
        if not mean <= bound_of("32-true", engine.dtype):
            return f"refused: WeightSyncCheck stops the run: {mean:.1g} apart on average"
    if worst < BOUND:
        return "yes"
    if engine.dtype == torch.bfloat16:
        return f"yes, in bfloat16, which vLLM's CPU kernels need: {mean:.1g} apart on average"
    return f"yes, within {worst:.1g}: vLLM computes this architecture slightly differently"


def as_a_run_does(engine: Any, weights: Any) -> None:
    """Compare as a run does before its first rollout; see ``rollout/live.py``."""
    from benchmarks.architectures.families import make_tokenizer
    from kdrl_lightning.engines import agreement
    from kdrl_lightning.models.scorer import Scorer

    scorer, name = Scorer(weights.model), type(weights.model).__name__
    rows = weights.model.config.get_text_config().vocab_size

    @torch.no_grad()
    def require(which: str) -> None:
        engine.update_weights(weights, 0)
        batch = agreement.probe(engine, make_tokenizer(), rows, CONTEXT)
        call = batch.input_ids, batch.prompt_lengths, batch.completion_ids, batch.completion_mask
        scored = batch.replace(old_logprobs=scorer(*call).logprobs)
        bound = agreement.bound_of("32-true", engine.dtype)
        agreement.require_agreement(engine, name, scored, bound, which)

    with agreement.moved(agreement.equal_weights(weights.model)):
        require(agreement.MOVED)
    require(agreement.AS_THEY_ARE)


def last_line(out: subprocess.CompletedProcess[str]) -> str:
    """Return the last line of an error, or the exit code if there is no output."""
    lines = out.stderr.strip().splitlines()
    return lines[-1] if lines else f"the process ended with {out.returncode}"


def try_family(family: str, timeout: float = 240) -> str:
    """Return the cell of a family, tried in a separate process for at most ``timeout`` seconds."""
    command = [sys.executable, "-m", "benchmarks.architectures.vllm_case", "--alone", family]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"failed: no answer in {timeout:g} s"
    found = [x for x in out.stdout.splitlines() if x.startswith("RESULT ")]
    return found[0].removeprefix("RESULT ") if found else f"failed: {last_line(out)}"


def results() -> dict[str, str]:
    """Return the recorded cells, by family."""
    return dict(json.loads(RESULTS.read_text())) if RESULTS.exists() else {}


def record(family: str, result: str) -> None:
    """Add a cell to the recorded ones."""
    RESULTS.parent.mkdir(exist_ok=True)
    cells = dict(sorted({**results(), family: result}.items()))
    RESULTS.write_text(json.dumps(cells, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """Check families, each in a separate process, and add the results to earlier ones."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("families", nargs="+")
    parser.add_argument(
        "--alone",
        action="store_true",
        help="check one family in this process, and print the result",
    )
    parser.add_argument("--timeout", type=float, default=240, help="seconds per family")
    settings = parser.parse_args()
    if settings.alone:
        print(f"RESULT {check(settings.families[0])}", flush=True)
        os._exit(0)  # vLLM's threads would keep the process alive
    for family in settings.families:
        result = try_family(family, settings.timeout)
        print(family, result, flush=True)
        record(family, result)


if __name__ == "__main__":
    main()
