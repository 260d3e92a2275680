"""Prompts whose completions may grow past a change of the model are found before the run."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from helpers.rotary_models import CASES, LIMIT
from helpers.short_runs import fit, make_data, make_module
from helpers.small_models import build, save
from kdrl_lightning import GRPO, SFT, KDRLModule, LocalTeacher
from kdrl_lightning.callbacks import RunReport
from kdrl_lightning.engines import Completion, TransformersEngine, VLLMEngine
from kdrl_lightning.engines.vllm.requests import warn_of_one_rotary
from kdrl_lightning.errors import BadRow, ConfigurationError, TrainingStopped
from kdrl_lightning.models.architectures.switches import Change
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.prompts import PromptSource
from kdrl_lightning.prompts.prompt_set import PromptRules, PromptSet
from kdrl_lightning.tiny.models import make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")

SHORT, CROSSING, LONG = ({"prompt": "1" * n} for n in (22, 25, 40))


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> str:
    model_type, settings = CASES["longrope"]
    return save(model_type, tmp_path_factory.mktemp("longrope"), **settings)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save("llama", tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("tokens", [1, 10, 100])
@pytest.mark.parametrize("always", [False, True])
def test_what_crosses(tokens: int, always: bool) -> None:
    lengths = Change(LIMIT, always, "").crossing(tokens)
    for prompt in range(1, 200):
        wanted = prompt + tokens > LIMIT and (always or prompt <= LIMIT)
        assert (prompt in lengths) == wanted


@pytest.mark.parametrize("where", ["train_prompts", "val_prompts"])
def test_such_a_prompt_refuses_the_run_before_weights_are_loaded(
    tmp_path: Path, longrope: str, where: str
) -> None:
    words = re.escape(
        f"`{where}` must have at most 22 tokens a prompt (TransformersEngine cannot sample past 32 "
        "tokens, beyond which the rotary embedding of Phi3ForCausalLM changes; `max_tokens` 10): "
        "got 25 in row 2 (above the limit: 1 of 3). Set `overlong_prompts: drop`, or lower "
        "`max_tokens`."
    )
    sets = {"train_prompts": [SHORT], "val_prompts": [SHORT]}
    module = make_module(longrope, None, GRPO())
    with pytest.raises(ConfigurationError, match=f"^{words}$"):
        fit(tmp_path, module, make_data(**{**sets, where: [SHORT, LONG, CROSSING]}))
    assert module.student is None


def test_such_prompts_are_left_out_and_longer_ones_stay(
    tmp_path: Path, longrope: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(
        train_prompts=[SHORT, CROSSING, LONG, CROSSING],
        val_prompts=None,
        overlong_prompts="drop",
        prompts_per_rollout=2,
    )
    trace = fit(tmp_path, make_module(longrope, None, GRPO()), data, max_steps=2)
    words = "train_prompts: 2 of 4 prompts are left out because they have more than 22 tokens\n"
    assert capsys.readouterr().out.count(words) == 1
    lengths = {int(n) for _, batch in trace.seen for n in batch.lengths - batch.completion_lengths}
    assert lengths == {22, 40}


def test_the_teacher_that_samples_counts(tmp_path: Path, plain: str, longrope: str) -> None:
    data = make_data(
        train_prompts=[CROSSING], val_prompts=None, group_size=0, teacher_completions=2
    )
    module = KDRLModule(plain, SFT(), LocalTeacher(longrope))
    words = r"`train_prompts` must have at most 22 tokens a prompt .* of Phi3ForCausalLM changes"
    with pytest.raises(ConfigurationError, match=words):
        fit(tmp_path, module, data)


class Elsewhere(TransformersEngine):
    """An engine that can sample across the change, as vLLM can."""

    def refused_lengths(self, path: str, max_tokens: int) -> list[tuple[range, str]]:
        return []

    def generate(self, prompts: Any, seeds: Any, sampling: Any) -> list[list[Completion]]:
        return [[Completion([s % 7 + 5], [-1.0], True) for s in own] for own in seeds]


def test_the_report_says_whom_it_cannot_measure(tmp_path: Path, longrope: str) -> None:
    data = make_data(
        train_prompts=[CROSSING],
        val_prompts=[CROSSING],
        rollout_engine=Elsewhere(),
        rollouts_per_epoch=1,
        minibatches_per_rollout=1,
    )
    report = RunReport(export=False)
    words = (
        r"the student is not measured on the first validation set: TransformersEngine cannot "
        r"sample past 32 tokens, beyond which the rotary embedding of Phi3ForCausalLM changes; "
        r"`max_tokens` 10\.$"
    )
    with pytest.warns(UserWarning, match=words):
        fit(tmp_path, make_module(longrope, None, GRPO()), data, [report], max_steps=1)
    assert [step for step, _ in report.accuracy] == [1]  # a validation samples by the engine


class Stop(pl.Callback):
    def on_before_optimizer_step(self, *_: Any) -> None:
        raise InterruptedError


def test_slow_sampling_is_said_before_the_first_update(tmp_path: Path) -> None:
    folder = save("openai-gpt", tmp_path / "model")
    data = make_data(train_prompts=[SHORT], val_prompts=None, max_tokens=2)
    words = "TransformersEngine samples OpenAIGPTLMHeadModel without a cache"
    with pytest.warns(UserWarning, match=words), pytest.raises(InterruptedError):
        fit(tmp_path, make_module(folder, None, GRPO()), data, [Stop()])


def test_sparse_attention_that_picks_keys(tmp_path: Path) -> None:
    folder = save("deepseek_v32", tmp_path)
    (lengths, reason), *others = TransformersEngine().refused_lengths(folder, 6)
    assert (lengths.start, 10**6 in lengths, others) == (3, True, [])
    assert "the choice of keys of DeepseekV32ForCausalLM changes" in reason
    assert TransformersEngine().refused_lengths(save("llama", tmp_path / "plain"), 6) == []


class Ones(PromptSource):
    """A large source with one prompt that crosses, which the sample does not hold."""

    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return CROSSING if index == 77 else SHORT


@pytest.mark.parametrize(("drop", "kind"), [(True, BadRow), (False, TrainingStopped)])
def test_a_row_met_later_is_left_out_or_stops_the_run(drop: bool, kind: type[Exception]) -> None:
    rules = PromptRules(limit=100, refused=[(range(23, 33), "so it is")], drop=drop)
    prompts = PromptSet(Ones(), "train_prompts", make_tokenizer(), rules)
    assert not prompts.overlong and len(prompts[76][1]) == 22
    words = r"row 77 of `train_prompts` has 25 tokens, above 22 \(so it is\)"
    with pytest.raises(kind, match=words):
        prompts[77]


def test_vllm_says_that_it_takes_one_embedding(
    longrope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_type, settings = CASES["longrope"]
    weights = ModelWeights(build(model_type, **settings), longrope)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(VLLMEngine, "_start", lambda *_: object())
    words = re.escape(
        "vLLM uses the rotary embedding of Phi3ForCausalLM for more than 32 tokens in rows of any "
        "length, because `max_model_len` is 128: its log-probabilities of shorter rows differ from "
        "the trainer's. Set `max_model_len` to 32 if prompts with their completions fit."
    )
    with pytest.warns(UserWarning, match=f"^{words}$"):
        VLLMEngine().setup(weights, 1, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VLLMEngine(max_model_len=LIMIT).setup(weights, 1, 0)
        for name in ("dynamic", "dynamic in some layers"):
            warn_of_one_rotary(build(CASES[name][0], **CASES[name][1]), 128)
