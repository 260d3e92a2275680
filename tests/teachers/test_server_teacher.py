"""The teacher on servers: faults of a scripted one, and a real one in a separate process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.short_runs import fit, make_data, make_module
from helpers.with_vllm.need import ROOT, need_vllm, run
from helpers.with_vllm.teaching import Edit, Teaching
from kdrl_lightning import GRPO, RLAD, RolloutBatch, RoutedTeacher, ServerTeacher
from kdrl_lightning.callbacks import SelectiveImitationStats
from kdrl_lightning.engines import VLLMTeacherEngine
from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.objectives import GKD
from kdrl_lightning.rollout_batch import collate

CPU = torch.device("cpu")


def test_the_real_server(tmp_path: Path) -> None:
    need_vllm()
    cases = str(ROOT / "tests/teachers/teacher_cases.py")
    out = run(["pytest", "-n0", "-W", "default", "-q", cases], ROOT, timeout=400)
    assert out.returncode == 0, out.stdout[-6000:]
    assert int(re.search(r"(\d+) passed", out.stdout)[1]) >= 7 and "skipped" not in out.stdout  # type: ignore[index]


@pytest.fixture
def server(teacher_folder: str) -> Iterator[Teaching]:
    from kdrl_lightning.models.loading import load_tokenizer

    made = Teaching(load_tokenizer(teacher_folder))
    yield made
    made.http.shutdown()
    made.http.server_close()


def teacher_of(folder: str, *urls: str, **settings: Any) -> ServerTeacher:
    made = ServerTeacher(folder, list(urls), **{"max_away_s": 2.0, "timeout_s": 2.0, **settings})
    made.load(CPU)
    return made


@pytest.fixture
def batch() -> RolloutBatch:
    return collate([[3, 4], [5]], [[6, 7, 1], [2]], [0, 1], pad_id=0)


def test_values_stand_at_their_tokens(
    server: Teaching, teacher_folder: str, batch: RolloutBatch
) -> None:
    asked = torch.tensor([[[2, 3], [4, 5], [6, 99]], [[8, 9], [0, 0], [0, 0]]])
    scores = teacher_of(teacher_folder, server.url).score(batch, asked)
    assert scores.topk_ids is not None and scores.topk_logprobs is not None
    torch.testing.assert_close(scores.logprobs, torch.tensor([[-0.7, -0.8, -0.2], [-0.3, 0, 0]]))
    assert scores.topk_ids.shape == (2, 3, 1) and not scores.topk_ids.any()
    inf = torch.inf
    expected = [[[-0.3, -0.4], [-0.5, -0.6], [-0.7, -inf]], [[-0.9, -1.0], [0, 0], [0, 0]]]
    torch.testing.assert_close(scores.topk_logprobs, torch.tensor(expected))
    assert sorted(server.sizes) == [1, 1, 1, 3]  # all positions of a completion in one request


def test_many_ids_are_asked_for_in_several_requests(
    server: Teaching, teacher_folder: str, batch: RolloutBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdrl_lightning.teachers.server.MAX_IDS", 4)
    asked = torch.tensor([[[2, 3], [4, 5], [6, 8]], [[8, 9], [0, 0], [0, 0]]])
    scores = teacher_of(teacher_folder, server.url).score(batch, asked)
    assert scores.topk_logprobs is not None
    torch.testing.assert_close(scores.topk_logprobs[0], -(asked[0] + 1) / 10)
    assert sorted(server.sizes) == [1, 1, 1, 1, 1, 1]


def _drop(choice: dict[str, Any], body: dict[str, Any]) -> None:
    choice.get("prompt_logprobs", [0]).pop()


def _rename(choice: dict[str, Any], body: dict[str, Any]) -> None:
    choice["prompt_logprobs"] = [None, *({"15": {"logprob": 0, "rank": 1}} for _ in range(4))]


def _cut(choice: dict[str, Any], body: dict[str, Any]) -> None:
    choice["prompt_token_ids"] = choice["prompt_token_ids"][1:]


def _forget(choice: dict[str, Any], body: dict[str, Any]) -> None:
    if "logprobs" in choice:
        choice["logprobs"]["top_logprobs"][0].popitem()


def _logits(choice: dict[str, Any], body: dict[str, Any]) -> None:
    if "logprobs" in choice:
        table = choice["logprobs"]["top_logprobs"][0]
        choice["logprobs"]["top_logprobs"] = [{k: v + 3.0 for k, v in table.items()}]


def _none(choice: dict[str, Any], body: dict[str, Any]) -> None:
    choice["prompt_logprobs"] = None


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_drop, r"got \d log-probabilities for \d tokens"),
        (_rename, r"got 5 log-probabilities for \d tokens"),
        (_cut, r"got an answer for other prompts"),
        (_none, r"got no prompt_logprobs"),
        (_forget, r"got \d of \d requested tokens"),
        (_logits, r"got .* for a token scored -0\.\d+ before"),
    ],
)
def test_answers_about_something_else_are_refused(
    server: Teaching, teacher_folder: str, batch: RolloutBatch, edit: Edit, words: str
) -> None:
    teacher = teacher_of(teacher_folder, server.url)
    server.edit = edit
    asked = torch.full((2, 3, 1), 4)
    with pytest.raises(
        TrainingStopped, match=rf"{server.url} must answer /v1/completions: {words}"
    ):
        teacher.score(batch, asked)


def test_transient_faults_are_tried_again_and_lasting_ones_name_the_url(
    server: Teaching, teacher_folder: str, batch: RolloutBatch
) -> None:
    teacher = teacher_of(teacher_folder, server.url, max_away_s=1.0)
    server.faults = [(503, "later"), (429, "later")]
    assert float(teacher.score(batch).logprobs[1, 0]) == pytest.approx(-0.3)
    server.faults = [(503, "overloaded")] * 99
    with pytest.raises(TrainingStopped, match=rf"{server.url} must answer within `max_away_s` 1"):
        teacher.score(batch)
    with pytest.raises(TrainingStopped, match=r"http://127\.0\.0\.1:9 must answer within"):
        teacher_of(teacher_folder, "http://127.0.0.1:9", max_away_s=0.1)


def test_where_one_process_has_to_stop_all_do(
    server: Teaching, teacher_folder: str, batch: RolloutBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, asked = teacher_of(teacher_folder, server.url, max_away_s=0.1), []

    def on_any_rank(flag: bool, device: torch.device) -> bool:
        asked.append(flag)
        return True

    assert not teacher.collective
    monkeypatch.setattr(ServerTeacher, "collective", True)
    monkeypatch.setattr("kdrl_lightning.teachers.server.on_any_rank", on_any_rank)
    with pytest.raises(TrainingStopped, match="another process had to stop"):
        teacher.score(batch)
    server.faults = [(503, "down")] * 9
    with pytest.raises(TrainingStopped, match=rf"{server.url} must answer within"):
        teacher.score(batch)
    assert asked == [False, True]  # both tell the others before they stop


def test_servers_share_the_completions_of_one_model(
    server: Teaching, teacher_folder: str, batch: RolloutBatch
) -> None:
    from kdrl_lightning.models.loading import load_tokenizer

    other = Teaching(load_tokenizer(teacher_folder))
    try:
        teacher = teacher_of(teacher_folder, server.url, other.url)
        teacher.score(batch)
        assert (len(server.sizes), len(other.sizes)) == (1, 1)
        other.root = "another"
        words = rf"all `urls` must serve the same model: got teacher, and another from {other.url}"
        with pytest.raises(TrainingStopped, match=words):
            teacher_of(teacher_folder, server.url, other.url)
    finally:
        other.http.shutdown()
        other.http.server_close()


@pytest.mark.filterwarnings("ignore:.* of the (completions|groups) ")
def test_a_run_with_it_has_no_entropy_and_no_full_distributions(
    server: Teaching, student_folder: str, teacher_folder: str, tmp_path: Path
) -> None:
    teacher = teacher_of(teacher_folder, server.url)
    stats = SelectiveImitationStats()
    module = make_module(student_folder, teacher, RLAD())
    trace = fit(tmp_path, module, make_data(), [stats], max_steps=2, limit_val_batches=0)
    assert trace.seen[0][1].teacher_entropy is None
    assert "kd/reverse_kl" in stats.rows[0] and "kd/teacher_entropy" not in stats.rows[0]
    assert "kd/top_token_agreement" in stats.rows[0]
    with pytest.raises(ConfigurationError, match=r"must give hidden states .* got ServerTeacher"):
        fit(tmp_path, make_module(student_folder, teacher, GKD()), make_data(), max_steps=1)


def test_another_temperature_and_engines_of_fixed_weights_are_refused(
    student_folder: str, teacher_folder: str, tmp_path: Path
) -> None:
    teacher = ServerTeacher(teacher_folder, ["http://127.0.0.1:9"])
    for one in (teacher, RoutedTeacher({"a": teacher})):
        module = make_module(student_folder, one)
        module.configure_model = lambda: None  # type: ignore[method-assign]
        with pytest.raises(ConfigurationError, match=r"`temperature` must be 1 .*: got 0\.7\. vLL"):
            fit(tmp_path, module, make_data(temperature=0.7))
    data = make_data(rollout_engine=VLLMTeacherEngine(["http://127.0.0.1:9"]))
    with pytest.raises(ConfigurationError, match=r"must be one that takes the student's weights"):
        fit(tmp_path, make_module(student_folder, None, GRPO()), data)
