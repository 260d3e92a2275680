"""Weights that go to vLLM and numbers that come back, on a pretended GPU.

fsdp2's gather of weights is missing here: torch's DTensors cannot hold the pretended GPU's tensors.
Its collectives run in two processes in tests/models/test_sharding.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.pretend_cuda import Card, pretend_cuda, to_card
from kdrl_lightning import LoRA, ServerTeacher
from kdrl_lightning.engines import Sampling, VLLMEngine
from kdrl_lightning.engines.vllm.hub_names import HubWeights
from kdrl_lightning.engines.weight_files import read_shards, write_shards
from kdrl_lightning.models import weights as reading
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rollout_batch import collate
from kdrl_lightning.teachers import server as servers

BF16 = torch.bfloat16


def engine_with(llm: Any) -> Any:
    """An engine around a pretended vLLM."""
    engine: Any = VLLMEngine.__new__(VLLMEngine)
    engine.sleep, engine._model, engine._path, engine._sampled = False, None, "student", False
    engine._llm, engine.dtype, engine._ends, engine._vocab_size = llm, BF16, (1,), 40
    engine.context, engine.version = 64, None
    return engine


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_vllm_gets_the_weights_in_its_type_from_the_card_without_a_wait(
    student_folder: str, monkeypatch: pytest.MonkeyPatch, lora: LoRA | None
) -> None:
    monkeypatch.setattr(reading, "LARGE", 64)
    model, got = load_causal_lm(student_folder), {}
    if lora is not None:
        lora.inject(model, 0)

    def take(method: str, kwargs: Any) -> None:
        assert method == "reload_weights"
        got.update(kwargs["weights_iterator"])

    engine = engine_with(SimpleNamespace(collective_rpc=take, reset_prefix_cache=lambda: True))
    names = set(dict(HubWeights(ModelWeights(model, student_folder)).tensors()))
    with pretend_cuda() as waits:
        to_card(model)
        waits.clear()
        engine.update_weights(ModelWeights(model, student_folder), 3)
        assert not waits, dict(waits)
    assert engine.version == 3 and got.keys() == names
    assert all(isinstance(tensor, Card) for tensor in got.values())
    kinds = {tensor.dtype for tensor in got.values() if tensor.dim() > 1}
    assert kinds == {BF16}


def test_a_file_of_weights_waits_once_per_tensor(student_folder: str, tmp_path: Path) -> None:
    model = load_causal_lm(student_folder)
    wanted = dict(HubWeights(ModelWeights(model, student_folder)).tensors())
    with pretend_cuda() as waits:
        to_card(model)
        waits.clear()
        write_shards(HubWeights(ModelWeights(model, student_folder)).tensors(), tmp_path)
        assert dict(waits) == {"_to_copy": len(wanted)}
    for name, tensor in read_shards(tmp_path):
        assert torch.equal(tensor, wanted[name])


def test_what_vllm_samples_reaches_the_card_without_a_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vllm = ModuleType("vllm")
    vllm.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)

    def sample(prompts: list[Any], parameters: list[Any], use_tqdm: bool) -> list[Any]:
        assert all(type(i) is int for p in prompts for i in p["prompt_token_ids"])
        out = []
        for given in parameters:
            ids = [3 + given.seed, 4, 1]
            values = [{i: SimpleNamespace(logprob=-0.5 * i)} for i in ids]
            out.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, logprobs=values)]))
        return out

    engine = engine_with(SimpleNamespace(generate=sample))
    engine.version = 0
    prompts, seeds = [[2, 3], [5]], [[1, 2], [3]]
    with pretend_cuda() as waits:
        groups = engine.generate(prompts, seeds, Sampling(4))
        flat = [(p, c) for p, group in zip(prompts, groups, strict=True) for c in group]
        batch = collate(
            [p for p, _ in flat], [c.ids for _, c in flat], [0, 0, 1], pad_id=0
        ).replace(rollout_logprobs=torch.tensor([c.logprobs for _, c in flat]))
        moved = batch.to(torch.device("cuda"))
        assert not waits, dict(waits)
        assert isinstance(moved.input_ids, Card) and isinstance(moved.rollout_logprobs, Card)
        assert moved.rollout_logprobs.cpu().tolist()[2] == [-3.0, -2.0, -0.5]


def test_a_teachers_server_scores_a_batch_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(self: Any, server: Any, ids: list[int], start: int, asked: Any) -> servers.Row:
        size = len(ids) - start
        wanted = [] if asked is None else [[-1.0 * i for i in step] for step in asked]
        return servers.Row([-0.25] * size, [7] * size, wanted)

    monkeypatch.setattr(ServerTeacher, "_row", row)
    monkeypatch.setattr(servers.ServerClient, "patiently", lambda self, work: work())
    teacher = ServerTeacher("teacher", ["http://127.0.0.1:9"])
    teacher._vocab_size, teacher._context = 40, 64
    batch = collate([[2, 3], [5]], [[4, 6, 1], [8, 1]], [0, 1], pad_id=0)
    asked = batch.completion_ids[..., None]
    plain = teacher.score(batch, asked)
    with pretend_cuda() as waits:
        here, there = batch.to(torch.device("cuda")), to_card(asked)
        waits.clear()
        scores = teacher.score(here, there)
        # Ids, lengths and what was asked for leave the card; nothing else does.
        assert sum(waits.values()) <= 6, dict(waits)
        for ours, theirs in zip(scores, plain, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                assert isinstance(ours, Card) and torch.equal(ours.cpu(), theirs)
