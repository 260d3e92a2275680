"""A real server on loopback: ``test_server`` runs these cases in a separate process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.architectures.families import save
from benchmarks.architectures.vllm_case import change, settings
from helpers.with_vllm.models import EOS, PAD, make_model, worst_gap
from helpers.with_vllm.servers import KEY, RealServer
from kdrl_lightning.engines import Sampling, TransformersEngine, VLLMServerEngine
from kdrl_lightning.engines.vllm.nccl_transport import TransferRoute, meeting_point
from kdrl_lightning.engines.weight_transport import FileRoute
from kdrl_lightning.errors import TrainingStopped
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.tiny.models import Recipe, save_untrained

PROMPTS = [[5, 9, 13, 4, 15], [7], [3, 14, 3, 3], [12, 11, 10], [4] * 7, [6, 13, 8]]
SEEDS = [[100 * i + j for j in range(4)] for i in range(len(PROMPTS))]
BOUND = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made: Path = tmp_path_factory.mktemp("student")
    save_untrained(Recipe(64, 1, 1, 1e-3, False), made, seed=0)
    return str(made)


@pytest.fixture(scope="module")
def server(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    made = RealServer(
        folder,
        tmp_path_factory.mktemp("log") / "server.log",
        flags=["--transfer", "store"],
        vllm_flags=["--worker-extension-cls", "helpers.with_vllm.store_transfer.Worker"],
    )
    yield made
    made.kill()


@pytest.fixture
def engine(server: RealServer, model: Any, folder: str) -> VLLMServerEngine:
    made = VLLMServerEngine([server.url], KEY)
    made.setup(ModelWeights(model, folder), EOS, PAD)
    made.update_weights(ModelWeights(model, folder), 0)
    return made


def changed(folder: str) -> Any:
    torch.manual_seed(1)
    other = load_causal_lm(folder)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return other


def test_completions_are_reproducible_and_scored_as_by_the_trainer(
    engine: VLLMServerEngine, model: Any
) -> None:
    assert engine.dtype == torch.float32
    for temperature in (1.0, 0.7):
        groups = engine.generate(PROMPTS, SEEDS, Sampling(16, temperature))
        assert worst_gap(model, PROMPTS, groups, temperature) < BOUND
    again = engine.generate(PROMPTS[::-1], SEEDS[::-1], Sampling(16, 0.7))[::-1]
    assert [[c.ids for c in g] for g in again] == [[c.ids for c in g] for g in groups]
    flat = [c for group in groups for c in group]
    assert {c.truncated for c in flat} == {True, False}
    assert all(c.truncated == (EOS not in c.ids) for c in flat)
    assert len({tuple(c.ids) for c in flat}) > 12


def test_greedy_is_that_of_the_transformers_engine(
    engine: VLLMServerEngine, model: Any, folder: str
) -> None:
    exact = TransformersEngine()
    exact.setup(ModelWeights(model, folder), EOS, PAD)
    greedy = Sampling(12, temperature=0.0)
    ours, theirs = (e.generate(PROMPTS, [[0]] * 6, greedy) for e in (engine, exact))
    assert [g[0].ids for g in ours] == [g[0].ids for g in theirs]


def test_after_an_update_the_new_weights_sample(
    engine: VLLMServerEngine, model: Any, folder: str
) -> None:
    new = changed(folder)
    engine.update_weights(ModelWeights(new, folder), 5)
    groups = engine.generate(PROMPTS, SEEDS, Sampling(16))
    assert engine.version == 5
    assert worst_gap(new, PROMPTS, groups) < BOUND
    assert worst_gap(model, PROMPTS, groups) > 0.1


def test_weights_by_the_transfer_api(
    engine: VLLMServerEngine,
    server: RealServer,
    model: Any,
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert isinstance(engine._route, FileRoute)  # on a CPU, unless it is asked for
    from helpers.with_vllm.store_transfer import Trainer

    monkeypatch.setattr(
        "kdrl_lightning.engines.vllm.nccl_transport.init_info",
        lambda backend, url, world, rank: Trainer(*meeting_point(url), rank=rank),
    )
    other = VLLMServerEngine([server.url], KEY, transfer=True)
    other.setup(ModelWeights(model, folder), EOS, PAD)
    for version, now in enumerate((model, changed(folder), model)):
        other.update_weights(ModelWeights(now, folder), version)
        groups = other.generate(PROMPTS, SEEDS, Sampling(16))
        assert worst_gap(now, PROMPTS, groups) < BOUND
    assert isinstance(other._route, TransferRoute)
    # Another engine's files replace them: as after a restart, they cannot come again alone.
    engine.generate(PROMPTS, SEEDS, Sampling(4))
    with pytest.raises(TrainingStopped, match=rf"{server.url} must keep the weights until the"):
        other.generate(PROMPTS, SEEDS, Sampling(4))
    # What the server does not take is an error, and it goes on with what it gets next.
    with pytest.raises(TrainingStopped, match=rf"{server.url} must take the weights through the"):
        other.update_weights(ModelWeights(make_model("llama", 0).model, folder), 8)
    engine.update_weights(ModelWeights(model, folder), 1)
    assert worst_gap(model, PROMPTS, engine.generate(PROMPTS, SEEDS, Sampling(4))) < BOUND


def test_two_engines_do_not_sample_from_each_others_weights(
    engine: VLLMServerEngine, server: RealServer, model: Any, folder: str
) -> None:
    new = changed(folder)
    other = VLLMServerEngine([server.url], KEY)
    other.setup(ModelWeights(new, folder), EOS, PAD)
    other.update_weights(ModelWeights(new, folder), 0)
    for asked, own in ((engine, model), (other, new), (engine, model)):
        assert worst_gap(own, PROMPTS, asked.generate(PROMPTS, SEEDS, Sampling(4))) < BOUND


def test_bad_prompts_are_refused_here(engine: VLLMServerEngine) -> None:
    for prompt, words in (([], "at least one token"), ([99], "got 99"), ([5] * 120, "must fit")):
        with pytest.raises(TrainingStopped, match=words):
            engine.generate([prompt], [[0]], Sampling(16))


def test_wrong_key_and_wrong_model_name_the_url(
    server: RealServer, model: Any, folder: str
) -> None:
    wrong = VLLMServerEngine([server.url], "another key")
    weights = ModelWeights(model, folder)
    wrong.setup(weights, EOS, PAD)  # the development routes ask for no key
    wrong.update_weights(weights, 0)
    with pytest.raises(TrainingStopped, match=rf"{server.url} .* status 401.*VLLM_API_KEY"):
        wrong.generate([[5]], [[0]], Sampling(2))
    for name, words in (("llama", "architecture is LlamaForCausalLM"), ("qwen2", "vocab_size is")):
        with pytest.raises(TrainingStopped, match=rf"{server.url} must serve the student.*{words}"):
            VLLMServerEngine([server.url], KEY).setup(
                ModelWeights(make_model(name, 0), folder), EOS, PAD
            )


def test_weights_that_do_not_fit_are_one_error(engine: VLLMServerEngine, folder: str) -> None:
    with pytest.raises(TrainingStopped, match=r"must answer load_student: got \w+Error: "):
        engine.update_weights(ModelWeights(make_model("llama", 0).model, folder), 1)


def test_killed_in_the_middle_and_restarted(
    engine: VLLMServerEngine, server: RealServer, folder: str
) -> None:
    new = changed(folder)
    engine.update_weights(ModelWeights(new, folder), 1)
    prompts, seeds, sampling = PROMPTS * 20, SEEDS * 20, Sampling(100)
    expected = engine.generate(prompts, seeds, sampling)
    up = "Application startup complete"
    starts = server.log.read_text().count(up)

    def restart() -> None:
        time.sleep(0.5)
        server.kill()
        time.sleep(1.0)
        server.start(as_a_user=True)

    thread = threading.Thread(target=restart)
    thread.start()
    # The new server starts from the folder's weights: it must get the student's again.
    got = engine.generate(prompts, seeds, sampling)
    thread.join()
    assert server.log.read_text().count(up) == starts + 1  # it was asked, died, and came back
    assert [[c.ids for c in g] for g in got] == [[c.ids for c in g] for g in expected]
    assert worst_gap(new, prompts, got) < BOUND


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_server_takes_what_needs_care(family: str, tmp_path: Path) -> None:
    """Experts and a tied head; transformers' code."""
    tied = {"tie_word_embeddings": True} if family == "mixtral" else {}
    path = save(family, tmp_path / "model", **tied, **settings(family))
    model = load_causal_lm(path)
    server = RealServer(path, tmp_path / "server.log", max_model_len=64)
    try:
        engine = VLLMServerEngine([server.url], KEY)
        weights = ModelWeights(model, path)
        engine.setup(weights, EOS, PAD)
        for version in (0, 1):
            if version:
                change(model)
            engine.update_weights(weights, version)
            groups = engine.generate(PROMPTS, SEEDS, Sampling(16))
            # GPT-OSS's experts amplify rounding; a lost update moves log-probabilities by 0.1.
            bound = 1e-3 if family == "gpt_oss" else BOUND
            assert worst_gap(model, PROMPTS, groups) < bound
    finally:
        server.kill()


def test_killed_for_good(engine: VLLMServerEngine, server: RealServer) -> None:
    server.kill()
    engine._servers[0].max_away_s = 2.0
    started = time.monotonic()
    with pytest.raises(TrainingStopped, match=rf"{server.url} must answer within `max_away_s` 2"):
        engine.generate(PROMPTS, SEEDS, Sampling(4))
    assert time.monotonic() - started < 10
