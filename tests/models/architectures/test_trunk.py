"""Attention kernels and compiled layers: settings, what they refuse, and what a pass runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from helpers import scored_models
from helpers.short_runs import fit, make_data, make_module
from helpers.small_models import save
from kdrl_lightning import GRPO, KDRLModule, LocalTeacher
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses.head.compiled import OrPlain
from kdrl_lightning.models.architectures.trunk import Layer, Trunk, compile_layers
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import decoder_layers, load_scorer, recompute_layers
from kdrl_lightning.rollout_batch import RolloutBatch, collate
from kdrl_lightning.teachers import CachedTeacher, RoutedTeacher

pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "cure"),
    [("spda", "Did you mean sdpa"), ("flash-attention-2", "Did you mean flash"), ("fast", "Leave")],
)
def test_an_unknown_kernel_is_one_line(name: str, cure: str) -> None:
    words = rf"`attn_implementation` must be one of sdpa, eager, .*: got {name}\. {cure}"
    with pytest.raises(ConfigurationError, match=words):
        KDRLModule("student", GRPO(), attn_implementation=name)
    with pytest.raises(ConfigurationError, match=words):
        LocalTeacher("teacher", attn_implementation=name)


def test_a_kernel_for_gpus_is_refused_on_a_cpu_before_weights_are_loaded(
    tmp_path: Path, student_folder: str
) -> None:
    words = "`attn_implementation` must be sdpa or eager on a CPU: got flash_attention_2"
    local = LocalTeacher(student_folder, attn_implementation="flash_attention_2")
    for teacher in (
        local,
        CachedTeacher(local, str(tmp_path / "scores")),
        RoutedTeacher({"a": local, "b": local}, column="task"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            teacher.check_device(CPU)
        teacher.check_device(torch.device("cuda"))
    module = make_module(student_folder, None, GRPO())
    module.trunk = Trunk("flash_attention_2")
    with pytest.raises(ConfigurationError, match=words):
        fit(tmp_path, module, make_data(val_prompts=None), max_steps=1)
    module = make_module(student_folder, local)
    with pytest.raises(ConfigurationError, match=words):
        fit(tmp_path, module, make_data(val_prompts=None), max_steps=1)
    assert module.student is None


def test_a_chosen_kernel_is_the_models(student_folder: str) -> None:
    for name in ("eager", "sdpa"):
        scorer = load_scorer(student_folder, torch.float32, trunk=Trunk(name))
        assert scorer.model.config._attn_implementation == name


def test_a_kernel_that_a_model_cannot_use_is_one_line(tmp_path: Path, student_folder: str) -> None:
    words = r"`attn_implementation` must be one that \w+ can use here: got flash_attention_2 \(.*\)"
    with pytest.raises(ConfigurationError, match=words):  # no CUDA here
        load_scorer(student_folder, torch.float32, trunk=Trunk("flash_attention_2"))
    capped = save("gemma2", tmp_path, attn_logit_softcapping=2.0)
    words = r"must be eager for Gemma2ForCausalLM: got sdpa, which leaves out a part of its atten"
    with pytest.raises(ConfigurationError, match=words):
        load_scorer(capped, torch.float32, trunk=Trunk("sdpa"))


class Calls:
    """Records the mask and the switch of every call of torch's attention."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[tuple[bool, bool]] = []
        plain = functional.scaled_dot_product_attention

        def attention(*args: Any, attn_mask: Any = None, is_causal: bool = False, **rest: Any):
            self.found.append((attn_mask is not None, is_causal))
            return plain(*args, attn_mask=attn_mask, is_causal=is_causal, **rest)

        monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)


def rows(lengths: list[tuple[int, int]]) -> RolloutBatch:
    """Rows of these prompts and completions, padded on the right."""
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, scored_models.VOCAB, (p + c,), generator=draw) for p, c in lengths]
    pairs = list(zip(ids, lengths, strict=True))
    return collate(
        [row[:p].tolist() for row, (p, _) in pairs],
        [row[p:].tolist() for row, (p, _) in pairs],
        list(range(len(ids))),
        pad_id=scored_models.PAD,
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "LlamaForCausalLM", "PhiForCausalLM"])
def test_padded_rows_have_no_mask(
    name: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scored_models.build(name)
    if recompute:
        recompute_layers(model)
    scorer, calls = Scorer(model), Calls(monkeypatch)
    scorer.shares = True  # nothing is shared: prompts differ
    for lengths in ([(5, 3), (1, 9), (7, 1)], [(5, 3)], [(4, 4), (4, 4)]):
        batch = rows(lengths)
        scorer.score(batch).logprobs.sum().backward()
        scorer.states(batch)
        assert set(calls.found) == {(False, True)}, lengths


def test_windows_have_a_mask_and_prompts_of_one_length_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = Calls(monkeypatch)
    Scorer(scored_models.build("Gemma3ForCausalLM")).score(rows([(9, 5), (6, 2)]))
    assert (True, False) in calls.found  # the window is shorter than the rows
    calls.found.clear()
    batch = rows([(9, 5), (9, 4)]).select([0, 0, 1, 1])
    ids = batch.input_ids.clone()
    ids[1, 9] += 1 if ids[1, 9] < 30 else -1  # no two rows are equal
    ids[3, 9] += 1 if ids[3, 9] < 30 else -1
    scorer = Scorer(scored_models.build("Qwen3ForCausalLM"))
    scorer.shares = True
    scorer.score(batch.replace(input_ids=ids))
    # Two layers: prompts without a mask; completions, whose queries stand at the end, with one.
    assert calls.found == [(False, True)] * 2 + [(True, False)] * 2


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what other tests compiled."""
    monkeypatch.setattr(OrPlain, "failed", set())
    yield
    torch.compiler.reset()


def scored(scorer: Scorer) -> list[Tensor]:
    scorer.zero_grad()
    scores = scorer.score(rows([(5, 3), (1, 9), (7, 1)]))
    assert scores.entropy is not None
    (scores.logprobs.sum() + scores.entropy.sum()).backward()
    return [scores.logprobs.detach(), *(p.grad.clone() for p in scorer.parameters())]


# Importing the compiler warns about torch's own files (torch 2.13); it looks for gradients of a
# layer's input.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.usefixtures("fresh")
def test_compiled_layers_are_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = scored(Scorer(scored_models.build("Qwen3ForCausalLM")))
    ran = []

    def backend(graph: Any, _: Any) -> Any:  # of torch's compiler without its C++ compiler
        def run(*args: Any) -> Any:
            ran.append(len(args))
            return graph.forward(*args)

        return run

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **given: real(f, backend=backend, **given))
    for recompute in (False, True):
        model = scored_models.build("Qwen3ForCausalLM")
        switch_on = compile_layers(decoder_layers(model))
        if recompute:
            recompute_layers(model)
        scorer = Scorer(model)
        for a, b in zip(scored(scorer), plain, strict=True):
            assert torch.equal(a, b)
        assert not ran
        switch_on()
        for a, b in zip(scored(scorer), plain, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert len(ran) == (4 if recompute else 2)  # once per layer and pass
        ran.clear()
    assert not OrPlain.failed


def test_a_pass_with_a_cache_stays_plain() -> None:
    layer = Layer(lambda *_, **__: "plain")
    layer.compiled = lambda *_, **__: "compiled"  # type: ignore[assignment]
    assert layer(1) == "plain"
    layer.on = True
    assert layer(1) == layer(1, past_key_values=None) == "compiled"
    assert layer(1, past_key_values=object()) == "plain"


@pytest.mark.usefixtures("fresh")
def test_layers_that_cannot_be_compiled_run_plain_after_one_warning(
    tmp_path: Path, student_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(function: Any, **_: Any) -> Any:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no compiler here\nand a long trace")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    module = make_module(student_folder, LocalTeacher(student_folder, compile=True))
    module.trunk = Trunk(compile=True)
    words = r"torch\.compile failed on the layers of a model: no compiler here\. This part runs"
    with pytest.warns(UserWarning, match=words) as told:
        fit(tmp_path, module, make_data(val_prompts=None), max_steps=2)
    assert len([x for x in told if "torch.compile" in str(x.message)]) == 1
