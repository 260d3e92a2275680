"""Sharded scorers of every architecture against plain ones, in a group of one process."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from helpers.scored_models import ARCHITECTURES, build, reference, rollout
from kdrl_lightning.engines.agreement import equal_weights, moved
from kdrl_lightning.engines.replica import filled_replica
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses import generalized_jsd
from kdrl_lightning.losses.logprobs import Head, Other
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import Sharding, decoder_layers, load_scorer, recompute_layers
from kdrl_lightning.models.weights import ModelWeights, full_tensor, plain_name
from kdrl_lightning.teachers import LocalTeacher

CASES = [(name, tied) for name in ARCHITECTURES for tied in (True, False)]
every = pytest.mark.parametrize(("name", "tied"), CASES)


@pytest.fixture(scope="module")
def sharding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sharding]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Sharding(init_device_mesh("cpu", (1,)))
    dist.destroy_process_group()


def shard(sharding: Sharding, model: Any, **settings: Any) -> Scorer:
    return sharding.shard(Scorer(copy.deepcopy(model)), **settings)


def test_integers_in_a_file_are_no_weights_of_a_sharded_model(sharding, student_folder, tmp_path):
    path = tmp_path / "cut"
    shutil.copytree(student_folder, path)
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].char()
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"got whole numbers in model\.norm\.weight"):
        load_scorer(str(path), "auto", sharding, frozen=True)


def test_a_sharded_student_that_computes_in_16_bits_keeps_the_fast_attention(
    sharding, student_folder
):
    """Its weights are in 32 bits, but its scores have the rounding of 16."""
    in_16_bits = Sharding(sharding.mesh, torch.bfloat16)
    scorer = load_scorer(student_folder, "float32", in_16_bits)
    assert scorer.model.config._attn_implementation == "sdpa" and scorer.pads


def test_constants_of_a_sharded_model_are_moved_for_a_comparison_and_restored(sharding):
    model, batch = build("Qwen2ForCausalLM"), rollout()
    plain, spread = Scorer(model), shard(sharding, model)
    before = [scorer.score(batch).logprobs.detach() for scorer in (plain, spread)]
    with moved(equal_weights(plain.model)):
        wanted = plain.score(batch).logprobs
        sent = {n: t.clone() for n, t in ModelWeights(plain.model, "x").named_tensors()}
    with moved(equal_weights(spread.model)):
        found = spread.score(batch).logprobs
        for name, tensor in ModelWeights(spread.model, "x").named_tensors():
            torch.testing.assert_close(tensor, sent[name], rtol=0, atol=0)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(wanted, before[0], atol=1e-3)
    assert torch.equal(spread.score(batch).logprobs, before[1])


@every
def test_scores_and_gradients_are_those_of_the_plain_model(sharding, name, tied):
    model, batch = build(name, tied), rollout(0.7)
    plain, spread = Scorer(model), shard(sharding, model)
    for scorer in (plain, spread):
        scores = scorer.score(batch, top_k=2)
        (scores.logprobs.sum() + scores.entropy.square().sum()).backward()
    logprobs, _ = reference(model, batch)
    torch.testing.assert_close(scores.logprobs, logprobs, atol=1e-5, rtol=1e-5)
    theirs = dict(plain.named_parameters())
    for key, parameter in spread.named_parameters():
        assert isinstance(parameter, DTensor), key
        assert isinstance(parameter.grad, DTensor), key
        torch.testing.assert_close(full_tensor(parameter.grad), theirs[key].grad)
    spread.verify(name)


@every
def test_every_layer_is_a_unit_of_its_own(sharding, name, tied):
    model = build(name, tied)
    spread = shard(sharding, model)
    layers = decoder_layers(spread.model)
    assert len(layers) == model.config.num_hidden_layers
    assert all(isinstance(layer, FSDPModule) for layer in layers)
    assert sum(isinstance(m, FSDPModule) for m in spread.modules()) == len(layers) + 1


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "PhiForCausalLM", "CohereForCausalLM"])
def test_the_states_of_a_sharded_teacher_give_the_same_divergence(sharding, name):
    teacher, student, batch = build(name), Scorer(build("LlamaForCausalLM")), rollout(0.7)

    def divergence(scorer: Scorer) -> torch.Tensor:
        with torch.no_grad():
            other = scorer.states(batch)
            scorer.score(batch)  # gathers and frees its weights once more
        student.zero_grad()
        scores = student.score(
            batch, other=other, divergence=lambda a, b: generalized_jsd(a, b, 0.5)
        )
        scores.divergence.sum().backward()
        gradient = student.model.lm_head.weight.grad
        return torch.cat([scores.divergence.detach().flatten(), gradient.flatten()])

    ours, theirs = divergence(Scorer(teacher)), divergence(shard(sharding, teacher))
    assert ours.norm() > 0
    torch.testing.assert_close(ours, theirs)


def test_verify_refuses_a_sharded_head_that_is_not_known(sharding, monkeypatch):
    scorer = shard(sharding, build("GraniteForCausalLM"))
    monkeypatch.setattr(scorer, "head", lambda: Head(scorer.model.get_output_embeddings().weight))
    with pytest.raises(ConfigurationError, match="the language-model head of it must be"):
        scorer.verify("it")


@pytest.mark.parametrize("tied", [True, False])
def test_a_replica_is_the_model_again_after_every_filling(sharding, tied):
    model = build("Qwen2ForCausalLM", tied)
    scorer = shard(sharding, model)
    weights = ModelWeights(scorer.model, "it")
    assert weights.sharded and not ModelWeights(model, "it").sharded
    replica = filled_replica(weights)
    assert (replica.lm_head.weight is replica.model.embed_tokens.weight) == tied
    ids = torch.arange(2, 12)[None]
    for _ in range(2):
        assert torch.equal(replica(ids).logits, model(ids).logits)
        with torch.no_grad():
            for parameter in (*model.parameters(), *scorer.model.parameters()):
                parameter.mul_(1.5)
        assert not torch.equal(replica(ids).logits, model(ids).logits)
        assert filled_replica(weights, replica) is replica


@pytest.mark.parametrize("tied", [True, False])
def test_names_fingerprint_and_export_are_those_of_the_plain_model(sharding, tmp_path, tied):
    model = build("Gemma2ForCausalLM", tied)
    # In bfloat16 passes: what was gathered for one must not be taken for the weights.
    scorer = shard(Sharding(sharding.mesh, torch.bfloat16), model)
    with torch.no_grad():
        scorer.score(rollout())
    spread = ModelWeights(scorer.model, "it")
    plain = ModelWeights(model, "it")
    for (a, x), (b, y) in zip(spread.named_tensors(), plain.named_tensors(), strict=True):
        assert a == b and not isinstance(x, DTensor) and torch.equal(x, y)
    assert spread.fingerprint() == plain.fingerprint()
    for weights in (spread, plain):
        weights.save(str(tmp_path / str(weights.sharded)))
    one, other = (tmp_path / name / "model.safetensors" for name in ("True", "False"))
    assert one.read_bytes() == other.read_bytes()
    spread.save(str(tmp_path / "silent"), writes=False)
    assert not (tmp_path / "silent").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "True")
    ids = torch.arange(2, 12)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_names_of_wrapped_models_are_plain():
    assert plain_name("module.model.layers.0._orig_mod.weight") == "model.layers.0.weight"
    compiled = torch.compile(build("LlamaForCausalLM"), backend="eager")
    names = [name for name, _ in ModelWeights(compiled, "it").named_tensors()]
    assert names == [name for name, _ in build("LlamaForCausalLM").named_parameters()]


def test_mixed_precision_is_for_trained_models_alone(sharding):
    mixed = Sharding(sharding.mesh, torch.bfloat16)
    seen = []

    def score(model: Any) -> Scorer:
        scorer = mixed.shard(Scorer(model))
        layer = decoder_layers(scorer.model)[0]
        layer.mlp.register_forward_pre_hook(lambda m, a: seen.append(a[0].dtype))
        other = Other(torch.full((15, 5), 1.001), Head(torch.eye(5)))  # bfloat16 has no 1.001

        scores = scorer.score(rollout(), other=other, divergence=lambda _, theirs: theirs.sum(-1))
        assert bool((scores.divergence[rollout().completion_mask] > 5.004).all())
        expected = Scorer(plain).score(rollout())
        torch.testing.assert_close(scores.logprobs, expected.logprobs, atol=0.2, rtol=0.02)
        return scorer

    plain = build("LlamaForCausalLM")
    student = score(build("LlamaForCausalLM"))
    score(build("LlamaForCausalLM").requires_grad_(False))
    assert seen == [torch.bfloat16, torch.float32]
    assert {p.dtype for p in student.parameters()} == {torch.float32}


@pytest.mark.parametrize("spread", [True, False])
def test_an_offloaded_teacher_scores_the_same(sharding, teacher_folder, student_folder, spread):
    batch = rollout()
    batch = batch.replace(input_ids=batch.input_ids % 16, completion_ids=batch.completion_ids % 16)
    plain, away = LocalTeacher(teacher_folder), LocalTeacher(teacher_folder, offload=True)
    away.spread(sharding if spread else None)
    for teacher in (plain, away):
        teacher.load(torch.device("cpu"))
    assert away.collective == spread and not plain.collective
    torch.testing.assert_close(away.score(batch), plain.score(batch))
    torch.testing.assert_close(away.states(batch).hidden, plain.states(batch).hidden)
    assert away.weights().sharded == spread
    assert away.fingerprint() == plain.fingerprint()


@every
def test_recomputed_layers_run_twice_for_the_same_gradient(name, tied):
    model, batch, runs = build(name, tied), rollout(), []
    plain = Scorer(copy.deepcopy(model))
    for layer in decoder_layers(model):
        # Before it: the second run ends inside, once nothing more is missing.
        layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    recompute_layers(model)
    recomputed = Scorer(model)
    with torch.no_grad():
        recomputed.score(batch)
    layers = model.config.num_hidden_layers
    assert len(runs) == layers
    for scorer in (plain, recomputed):
        scorer.score(batch).logprobs.sum().backward()
    assert len(runs) == 3 * layers
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in recomputed.named_parameters()]


def test_gpt2_layers_are_found_and_a_model_without_names_is_one_unit(sharding):
    model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=40)).eval()
    assert decoder_layers(model) == list(model.transformer.h)
    for module in model.modules():
        module._no_split_modules = None
    words = r"GPT2LMHeadModel names no layers \(`_no_split_modules`\): it is sharded as one unit"
    with pytest.warns(UserWarning, match=words):
        scorer = sharding.shard(Scorer(model))
    assert sum(isinstance(m, FSDPModule) for m in scorer.modules()) == 1
    with (
        pytest.warns(UserWarning, match=words),
        pytest.raises(ConfigurationError, match="`activation_checkpointing` must be false for"),
    ):
        recompute_layers(model)


def save(model: Any, folder: Path, **settings: Any) -> str:
    model.save_pretrained(folder, **settings)
    return str(folder)


@every
def test_a_model_is_read_in_parts_and_equals_the_loaded_one(
    sharding, tmp_path, monkeypatch, name, tied
):
    path, batch = save(build(name, tied), tmp_path, max_shard_size="20KB"), rollout()
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    plain = load_scorer(path, torch.float32)
    monkeypatch.setattr(
        "kdrl_lightning.models.sharding.load_causal_lm", None
    )  # would hold all of it
    spread = load_scorer(path, torch.float32, sharding)
    assert spread.model.generation_config.to_dict() == plain.model.generation_config.to_dict()
    ours, theirs = (dict(s.model.named_buffers()) for s in (plain, spread))
    assert ours.keys() == theirs.keys()
    for key, buffer in ours.items():
        assert torch.equal(buffer, theirs[key]), key
    for (key, tensor), (other, parameter) in zip(
        plain.named_parameters(), spread.named_parameters(), strict=True
    ):
        assert key == other and isinstance(parameter, DTensor) and parameter.requires_grad
        assert torch.equal(full_tensor(parameter.detach()), tensor), key
    with torch.no_grad():
        torch.testing.assert_close(spread.score(batch).logprobs, plain.score(batch).logprobs)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", torch.float64])
@pytest.mark.parametrize("offload", [False, True])
def test_types_are_those_of_the_loaded_model(sharding, tmp_path, dtype, offload):
    path = save(build("LlamaForCausalLM", dtype=torch.float16), tmp_path)
    plain = load_scorer(path, dtype, frozen=True)
    spread = load_scorer(path, dtype, sharding, frozen=True, offload=offload)
    for ours, theirs in zip(plain.parameters(), spread.parameters(), strict=True):
        assert ours.dtype == theirs.dtype and not theirs.requires_grad
    torch.testing.assert_close(spread.score(rollout()).logprobs, plain.score(rollout()).logprobs)


def test_weights_that_need_a_conversion_are_loaded_whole_with_a_warning(sharding, tmp_path):
    model = build("LlamaForCausalLM")
    path = save(model, tmp_path)
    state = {f"old.{n}": t.detach().clone() for n, t in model.state_dict().items()}
    (tmp_path / "model.safetensors").unlink()
    torch.save(
        {n.removeprefix("old."): t for n, t in state.items()}, tmp_path / "pytorch_model.bin"
    )
    with pytest.warns(UserWarning, match="cannot be read in parts"):
        scorer = load_scorer(path, torch.float32, sharding)
    torch.testing.assert_close(scorer.score(rollout()), Scorer(model).score(rollout()))


def test_a_scale_in_the_files_that_no_layer_multiplies_with_is_refused(
    sharding, student_folder, tmp_path
):
    shutil.copytree(student_folder, tmp_path / "copy")
    file = tmp_path / "copy/model.safetensors"
    scale = {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1)}
    save_file({**load_file(file), **scale}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"got model\.\S+scale_inv .+ without `weight_sca"):
        load_scorer(str(tmp_path / "copy"), torch.float32, sharding)
