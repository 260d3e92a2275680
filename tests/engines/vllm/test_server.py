"""The server engine: faults of a scripted server, and a real one in separate processes."""

from __future__ import annotations

import csv
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.with_vllm.need import ROOT, need_vllm, run
from helpers.with_vllm.scripted import Scripted
from kdrl_lightning.cli.serve import command, parse, serve
from kdrl_lightning.engines import Sampling, VLLMServerEngine
from kdrl_lightning.engines.http_client import ServerClient, clients
from kdrl_lightning.engines.vllm.hub_names import HubWeights
from kdrl_lightning.engines.vllm.nccl_transport import TransferRoute
from kdrl_lightning.engines.weight_files import read_shards, write_shards
from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.models.weights import ModelWeights

EOS, PAD = 1, 0


def test_the_real_server(tmp_path: Path) -> None:
    need_vllm()
    cases = str(ROOT / "tests/engines/vllm/server_cases.py")
    out = run(["pytest", "-n0", "-W", "default", "-q", cases], ROOT, timeout=600)
    assert out.returncode == 0, out.stdout[-6000:]
    assert int(re.search(r"(\d+) passed", out.stdout)[1]) >= 10 and "skipped" not in out.stdout  # type: ignore[index]


FLAGS = [
    f"--config={ROOT / 'configs/rlad.yaml'}",
    f"--config={ROOT / 'configs/engine/vllm_server.yaml'}",
    "--trainer.max_steps=80",
    "--data.val_prompts.size=64",
    "--report.evaluate_teacher=false",
]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    need_vllm()
    from helpers.with_vllm.servers import RealServer
    from kdrl_lightning.tiny import TinyModel

    made = RealServer(TinyModel("student").path(), tmp_path_factory.mktemp("log") / "server.log")
    yield made
    made.kill()


@pytest.mark.parametrize("lag", [0, 1])
def test_rlad_learns_through_a_server(real: Any, tmp_path: Path, lag: int) -> None:
    flags = [
        f"--data.rollout_engine.urls=[{real.url}]",
        f"--data.rollout.max_off_policy_steps={lag}",
    ]
    command = ["kdrl_lightning", "fit", *FLAGS, *flags]
    out = run(command, tmp_path, timeout=400, VLLM_API_KEY=real.key)
    assert out.returncode == 0, out.stderr[-3000:]
    folder = tmp_path / "runs/rlad/version_0"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["student_accuracy_before"] < 0.3
    assert summary["student_accuracy_after"] >= 0.9
    with open(folder / "metrics.csv") as file:
        steps = [row for row in csv.DictReader(file) if row["rollout/staleness"]][::4]
    ages = [float(row["rollout/staleness"]) for row in steps]
    assert ages == [0.0] + [4.0 * lag] * (len(steps) - 1)
    compared = [float(v) for row in steps if (v := row["rollout/logprob_diff_max"])]
    assert len(compared) == (-(-len(steps) // 10) if lag else len(steps))  # each tenth, or each
    assert 0.0 < max(compared) < 1e-3
    mismatch = [float(row["rollout/mismatch_kl"]) for row in steps]
    assert (max(mismatch[1:]) > 1e-4) == bool(lag)


# The last test that needs the server: the next one would have to wait for another.
def test_a_server_that_dies_leaves_a_checkpoint_and_its_url(real: Any, tmp_path: Path) -> None:
    real.wait()  # it may have been started for this test
    flags = [f"--data.rollout_engine.urls=[{real.url}]", "--data.rollout_engine.max_away_s=1"]
    command = ["kdrl_lightning", "fit", *FLAGS, *flags, "--trainer.max_steps=4000"]
    saved = tmp_path / "runs/rlad/version_0/checkpoints"

    def kill() -> None:
        while not list(saved.glob("*.ckpt")):
            time.sleep(0.1)
        real.kill()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    out = run(command, tmp_path, timeout=200, VLLM_API_KEY=real.key)
    thread.join(10)
    assert out.returncode == 1
    last = out.stderr.strip().splitlines()[-1]
    assert f"error: the server {real.url} must answer within `max_away_s` 1 seconds: got" in last
    (path,) = saved.glob("*.ckpt")
    state = torch.load(path, weights_only=True)
    assert state["global_step"] >= 4 and state["global_step"] % 4 == 0


@pytest.fixture(scope="module")
def weights(student_folder: str) -> ModelWeights:
    return ModelWeights(load_causal_lm(student_folder), student_folder)


@pytest.fixture
def server(weights: ModelWeights) -> Iterator[Scripted]:
    made = Scripted("Qwen2ForCausalLM", weights.model.config.vocab_size)
    yield made
    made.http.shutdown()
    made.http.server_close()


def engine_of(weights: ModelWeights, *urls: str, **settings: Any) -> VLLMServerEngine:
    made = VLLMServerEngine(list(urls), **{"max_away_s": 3.0, "timeout_s": 2.0, **settings})
    made.setup(weights, EOS, PAD)
    made.update_weights(weights, 0)
    return made


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_transient_fault_is_tried_again(
    server: Scripted, weights: ModelWeights, status: int
) -> None:
    engine = engine_of(weights, server.url)
    server.faults = [(status, "later")]
    ((one, two),) = engine.generate([[7]], [[0, 1]], Sampling(4))
    assert (one.ids, one.logprobs, one.truncated) == ([5, EOS], [-0.5, -1.0], False)
    assert two.logprobs == [-0.5, -2.0]
    assert server.loads == 1


def test_faults_that_last_stop_in_time_and_name_the_url(
    server: Scripted, weights: ModelWeights
) -> None:
    engine = engine_of(weights, server.url)
    server.faults = [(503, "overloaded")] * 100
    words = rf"{server.url} .* 3 seconds: got status 503: .*overloaded"
    with pytest.raises(TrainingStopped, match=words):
        engine.generate([[7]], [[0]], Sampling(4))
    assert 2 <= server.asked <= 5


def test_a_server_that_hangs_stops_in_time(server: Scripted, weights: ModelWeights) -> None:
    engine = engine_of(weights, server.url, timeout_s=0.3, max_away_s=1.0)
    server.wait_s, started = 0.8, time.monotonic()
    with pytest.raises(TrainingStopped, match=rf"{server.url} .* got TimeoutError"):
        engine.generate([[7]], [[0]], Sampling(4))
    assert time.monotonic() - started < 4.0


def test_a_lasting_fault_is_not_tried_again(server: Scripted, weights: ModelWeights) -> None:
    engine = engine_of(weights, server.url)
    server.faults = [(400, "no such model")]
    with pytest.raises(TrainingStopped, match=r"/v1/completions: got status 400: .*no such model"):
        engine.generate([[7]], [[0]], Sampling(4))
    assert server.asked == 1


def test_a_restarted_server_gets_the_weights_again(server: Scripted, weights: ModelWeights) -> None:
    engine = engine_of(weights, server.url)
    server.label = ""
    engine.generate([[7]], [[0]], Sampling(4))
    assert (server.loads, server.asked) == (2, 1)
    whole = server.complete

    def restarts_after(body: dict[str, Any]) -> Any:
        server.label, server.routes["/v1/completions"] = "", whole
        return whole(body)

    server.routes["/v1/completions"] = restarts_after
    engine.generate([[7]], [[0]], Sampling(4))
    assert (server.loads, server.asked) == (3, 3)  # the answers from unknown weights are not used


def test_several_servers_share_the_prompts(server: Scripted, weights: ModelWeights) -> None:
    other = Scripted("Qwen2ForCausalLM", weights.model.config.vocab_size)
    try:
        engine = engine_of(weights, server.url, other.url)
        groups = engine.generate([[7], [8], [9], [10]], [[0, 1], [2], [], [3, 4, 5]], Sampling(4))
    finally:
        other.http.shutdown()
        other.http.server_close()
    assert (server.asked, other.asked, server.loads, other.loads) == (2, 4, 1, 1)
    assert [[-c.logprobs[1] - 1 for c in group] for group in groups] == [[0, 1], [2], [], [3, 4, 5]]


def test_a_server_is_told_which_tokens_can_be_sampled(
    server: Scripted, weights: ModelWeights
) -> None:
    """Also that all can, because the server's own defaults may say otherwise."""
    bodies: list[dict[str, Any]] = []
    complete = server.complete
    server.routes["/v1/completions"] = lambda body: bodies.append(body) or complete(body)
    engine = engine_of(weights, server.url)
    engine.generate([[7]], [[0]], Sampling(4, 0.6, top_p=0.95, top_k=20, min_p=0.05))
    engine.generate([[7]], [[0]], Sampling(4))
    told = [(body["top_p"], body["top_k"], body["min_p"]) for body in bodies]
    assert told == [(0.95, 20, 0.05), (1.0, 0, 0.0)]


def test_without_development_mode_the_cure_is_named(
    server: Scripted, weights: ModelWeights
) -> None:
    del server.routes["/collective_rpc"]
    with pytest.raises(
        TrainingStopped, match=r"status 404.*The server does not run in development mode"
    ):
        engine_of(weights, server.url)


def test_without_the_extension_the_cure_is_named(weights: ModelWeights, server: Scripted) -> None:
    def fails(body: dict[str, Any]) -> Any:
        raise AssertionError  # never called: the handler below answers

    server.routes["/collective_rpc"] = fails
    handler: Any = server.http.RequestHandlerClass
    handler.do_POST = lambda self: (
        self.rfile.read(int(self.headers["Content-Length"])),
        self.reply(500, {"error": "no attribute student"}),
    )
    with pytest.raises(TrainingStopped, match=r"/collective_rpc: got status 500: .*no attribute"):
        engine_of(weights, server.url)


@pytest.mark.parametrize(
    ("name", "value"),
    [("vocab_size", "99"), ("architecture", "Other"), ("logprobs_mode", "raw_logprobs")],
)
def test_a_server_of_something_else_is_refused(
    server: Scripted, weights: ModelWeights, name: str, value: str
) -> None:
    server.describe[name] = value
    with pytest.raises(TrainingStopped, match=rf"whose {name} is .*: got {value}\. Start it with"):
        engine_of(weights, server.url)


@pytest.mark.parametrize("by", ["GptOssForCausalLM", "", "TransformersMoEForCausalLM"])
def test_a_server_whose_code_loses_updates_is_refused(
    server: Scripted, weights: ModelWeights, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = {weights.model.config.model_type: "sinks"}
    monkeypatch.setattr("kdrl_lightning.engines.vllm.options.BY_TRANSFORMERS", lost)
    monkeypatch.setattr("kdrl_lightning.engines.vllm.server.BY_TRANSFORMERS", lost)
    server.describe["implementation"] = by
    engine = VLLMServerEngine([server.url], "key")
    if by.startswith("Transformers"):
        engine.setup(weights, EOS, PAD)
        return
    words = rf"transformers' code, or updates of its sinks are lost: got {by or 'an old server'}\."
    with pytest.raises(TrainingStopped, match=words):
        engine.setup(weights, EOS, PAD)


@pytest.mark.parametrize(
    ("field", "value"),
    [("token_ids", [EOS, 5]), ("token_ids", []), ("prompt_token_ids", [7, 7])],
)
def test_answers_that_cannot_be_are_refused(
    server: Scripted, weights: ModelWeights, field: str, value: list[int]
) -> None:
    engine, whole = engine_of(weights, server.url), server.complete

    def wrong(body: dict[str, Any]) -> Any:
        answer = whole(body)
        answer["choices"][0][field] = value
        return answer

    server.routes["/v1/completions"] = wrong
    with pytest.raises(
        TrainingStopped, match=r"must return one log-prob|got an answer for another prompt"
    ):
        engine.generate([[7]], [[0]], Sampling(4))


def test_a_dead_address_is_one_error(weights: ModelWeights) -> None:
    with pytest.raises(
        TrainingStopped, match=r"http://127\.0\.0\.1:9 must answer .* ConnectionRefusedError"
    ):
        engine_of(weights, "http://127.0.0.1:9", max_away_s=0.6)


@pytest.mark.parametrize("urls", [[], "http://a", ["127.0.0.1:8000"]])
def test_urls_that_cannot_be_are_refused(urls: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"`urls` must be a list of at least one http"):
        VLLMServerEngine(urls)


def test_the_transfer_api_is_used_where_all_servers_offer_it(
    server: Scripted, weights: ModelWeights
) -> None:
    with pytest.raises(
        TrainingStopped, match=rf"`transfer` must be false .*got \[''\] from {server.url}"
    ):
        engine_of(weights, server.url, transfer=True)
    server.describe["transfer"] = "nccl"
    for wanted in (None, False):  # on a CPU
        engine_of(weights, server.url, transfer=wanted)
    assert server.loads == 2
    made = VLLMServerEngine([server.url], transfer=True)
    made.setup(weights, EOS, PAD)
    assert isinstance(made._route_of(weights), TransferRoute)


def test_a_failed_transfer_names_the_server_that_refused(
    weights: ModelWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send(_: TransferRoute, server: ServerClient, __: str) -> None:
        if "first" in server.url:
            raise ValueError("a wrong shape")

    monkeypatch.setattr(TransferRoute, "_send", send)
    servers = clients(["http://first:1", "http://second:1"], None, 1.0, 0.0)
    with pytest.raises(TrainingStopped, match=r"server http://first:1 must take .* a wrong shape"):
        TransferRoute("nccl").push(HubWeights(weights), servers, "1")


@pytest.mark.gpu
def test_weights_by_nccl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL needs a GPU for the trainer and another for the server")
    from helpers.with_vllm.models import make_model, save_model, worst_gap
    from helpers.with_vllm.servers import KEY, RealServer

    folder, model = save_model("qwen2", tmp_path / "model"), make_model("qwen2", 1).cuda()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # this process has its device already
    server = RealServer(folder, tmp_path / "server.log", flags=["--transfer", "nccl"])
    try:
        engine = VLLMServerEngine([server.url], KEY)
        engine.setup(ModelWeights(model, folder), EOS, PAD)
        engine.update_weights(ModelWeights(model, folder), 1)
        groups = engine.generate([[5, 6]], [[0, 1]], Sampling(8))
    finally:
        server.kill()
    assert isinstance(engine._route, TransferRoute)
    assert worst_gap(model.cpu(), [[5, 6]], groups) < 1e-2


def test_a_missing_folder_is_refused(server: Scripted, weights: ModelWeights) -> None:
    with pytest.raises(ConfigurationError, match=r"`weights_folder` must be a folder .*: got /no"):
        engine_of(weights, server.url, weights_folder="/no/folder")


def test_the_folder_holds_one_version_and_nothing_at_the_end(
    server: Scripted, weights: ModelWeights, tmp_path: Path
) -> None:
    engine = engine_of(weights, server.url, weights_folder=str(tmp_path))
    engine.update_weights(weights, 1)
    assert len(list(tmp_path.iterdir())) == 1
    del engine
    assert not list(tmp_path.iterdir())


def test_shards_hold_every_tensor_once_and_tied_ones_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = torch.arange(6.0).view(2, 3)
    tensors = {"a": shared, "b": shared, "c": shared.t(), "d": torch.ones(1)}
    monkeypatch.setattr("kdrl_lightning.engines.weight_files.SHARD_BYTES", 40)
    write_shards(iter(tensors.items()), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    found = dict(read_shards(tmp_path))
    assert list(found) == list(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    write_shards(iter(tensors.items()), None)  # a rank that only takes part in the reading
    with pytest.raises(FileNotFoundError, match=r"file system that trainer and servers share"):
        list(read_shards(tmp_path / "none"))


def test_another_address_needs_the_flag_and_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for host in ("0.0.0.0", "gpu7", "::"):
        with pytest.raises(
            ConfigurationError, match=rf"`--host` .* without `--expose`: got {host}"
        ):
            parse(["--model", "m", "--host", host])
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr("os.execve", lambda path, *rest: started.append(rest))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setenv("VLLM_API_KEY", "")
    serve(["--model", "m", "--host", "0.0.0.0", "--expose"])
    told = capsys.readouterr()
    assert "can replace the weights" in told.err and "0.0.0.0:8000" in told.err
    key = re.match(r"VLLM_API_KEY=(\S{32})  # give it", told.out)
    ((arguments, environment),) = started
    assert key is not None and key[1] not in " ".join(arguments)
    assert (environment["VLLM_API_KEY"], environment["VLLM_SERVER_DEV_MODE"]) == (key[1], "1")


def test_a_key_that_is_given_is_not_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.execve", lambda path, *rest: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setenv("VLLM_API_KEY", "mine")
    serve(["--model", "m"])
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "")


def test_a_teacher_is_served_without_the_routes_that_change_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr("os.execve", lambda path, *rest: started.append(rest))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setenv("VLLM_API_KEY", "mine")
    serve(["--teacher", "--model", "m", "--host", "0.0.0.0", "--expose"])
    ((arguments, environment),) = started
    assert "VLLM_SERVER_DEV_MODE" not in environment
    assert "--worker-extension-cls" not in arguments
    assert capsys.readouterr().err == ""


def test_the_command_has_what_rollouts_need() -> None:
    made = command(parse(["--model", "m", "--dtype", "float32", "--", "--enforce-eager"]))
    text = " ".join(made)
    for part in (
        "--host 127.0.0.1",
        "--logprobs-mode processed_logprobs",
        "--generation-config vllm",
        "--worker-extension-cls kdrl_lightning.engines.vllm.worker.StudentWorker",
        "--dtype float32",
    ):
        assert part in text
    assert made[-1] == "--enforce-eager" and "--max-model-len" not in made


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "the following arguments are required: --model"),
        (["--model=m", "--expos"], "unrecognized arguments: --expos"),
    ],
)
def test_a_mistake_in_serves_flags_is_one_line(flags: list[str], words: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        parse(flags)
    assert str(error.value) == f"{words} (see `python -m kdrl_lightning serve --help`)"


def test_serve_without_vllm_names_the_cure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kdrl_lightning.__main__ import main

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as error:
        main(["serve", "--model", "m"])
    assert error.value.code == 2
    assert "pip install 'kdrl_lightning[vllm]'" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["the folder", "the second file"])
def test_a_full_disk_stops_the_push_and_keeps_the_servers_weights(
    server: Scripted,
    weights: ModelWeights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    engine = engine_of(weights, server.url, weights_folder=str(tmp_path))
    before, taken = sorted(tmp_path.rglob("*")), 0

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def count(self: ModelWeights, name: str, tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        return tensor.detach()

    monkeypatch.setattr(ModelWeights, "_whole", count)
    if place == "the folder":
        monkeypatch.setattr("tempfile.mkdtemp", full)
    else:
        monkeypatch.setattr("kdrl_lightning.engines.weight_files.SHARD_BYTES", 1)
        monkeypatch.setattr("kdrl_lightning.engines.weight_files.save_file", full)
    words = (
        r"^`weights_folder` must have room for the student's weights: got OSError: .*No space left "
        rf"on device in {tmp_path}\. Make room, or name a folder on another disk\.$"
    )
    with pytest.raises(TrainingStopped, match=words):
        engine.update_weights(weights, 1)
    assert taken == len(list(weights.model.parameters()))  # other ranks wait for none
    assert sorted(tmp_path.rglob("*")) == before and server.loads == 1
