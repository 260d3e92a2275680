"""The benchmark's cases of architectures in a student's process: ``test_architectures`` runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.architectures.families import save
from benchmarks.architectures.vllm_case import END, PAD, check, logprobs, results, settings
from kdrl_lightning.engines import VLLMEngine
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.models.weights import ModelWeights

FAMILIES = {
    "smollm3": "vLLM runs it with transformers' classes",
    "gpt_neox": "so, and a head that the folder names otherwise",
    "gemma2": "a tied head that vLLM has no name for",
    "opt": "a tied head that vLLM keeps apart",
    "mixtral": "experts that the folder holds one by one",
    "gpt_oss": "experts and sinks that vLLM's own code writes where a reload does not look",
    "glm4_moe": "a stored buffer of the router",
    "lfm2": "queries and keys that vLLM's CPU kernel takes for other shapes",
    "deepseek_v3": "so, in a latent attention",
    "ernie4_5_moe": "a bias of the router that vLLM leaves out on a CPU",
    "cohere2": "a window that vLLM makes one token longer",
    "dbrx": "experts that vLLM's own code does not find by their names",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_arrive_and_the_student_stays(family: str) -> None:
    assert check(family) == results()[family] == "yes"


def test_a_difference_that_random_weights_hide_is_found_as_in_the_table() -> None:
    # Doge's gates are all zero at first; vLLM has no code for them.
    found = check("doge").partition(", which is ")
    assert found[0] == results()["doge"].partition(", which is ")[0]
    assert "away for DogeForCausalLM with the same weights, after a small change of" in found[2]


def test_a_second_engine_of_the_same_architecture(tmp_path: Path) -> None:
    path = save("smollm3", tmp_path, seed=3, **settings("smollm3"))
    model = load_causal_lm(path)
    before: Any = [logprobs(model, [5, 6], [20, 30, 40])]
    engine = VLLMEngine(max_model_len=64, kv_cache_memory_bytes=16 << 20)
    engine.setup(ModelWeights(model, path), END, PAD)
    assert torch.equal(logprobs(model, [5, 6], [20, 30, 40]), before[0])
    assert torch.equal(logprobs(load_causal_lm(path), [5, 6], [20, 30, 40]), before[0])
    engine.update_weights(ModelWeights(model, path), 0)


def test_an_architecture_that_vllm_has_not_is_one_line(tmp_path: Path) -> None:
    path = save("mpt", tmp_path, **settings("mpt"))
    with pytest.raises(ConfigurationError) as error:
        VLLMEngine(max_model_len=64).setup(ModelWeights(load_causal_lm(path), path), END, PAD)
    assert "\n" not in str(error.value)
    assert (
        "VLLMEngine, which could not start: Model architecture MptForCausalLM was supported"
        in str(error.value)
    )
