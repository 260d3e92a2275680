"""A real server of fixed weights: ``test_server_teacher`` runs it in a separate process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.with_vllm.need import ROOT, run
from helpers.with_vllm.servers import KEY, RealServer
from kdrl_lightning import (
    CachedTeacher,
    ColumnContext,
    LocalTeacher,
    PromptedTeacher,
    RolloutBatch,
    ServerTeacher,
    TeacherPrompt,
)
from kdrl_lightning.engines import Sampling, VLLMServerEngine, VLLMTeacherEngine
from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.models.loading import load_tokenizer
from kdrl_lightning.rollout_batch import collate
from kdrl_lightning.teachers.own_prompt.groups import Group, with_prompts
from kdrl_lightning.tiny import TinyModel

EOS = 1
PROMPTS = [[3, 4, 12, 5, 6, 13], [5, 12, 5, 13], [3, 4, 5, 6, 12, 7, 8, 9, 10, 13]]
BOUND = 1e-4


@pytest.fixture(scope="module")
def folder() -> str:
    return TinyModel("teacher").path()


@pytest.fixture(scope="module")
def server(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    made = RealServer(folder, log, flags=["--teacher"])
    yield made
    made.kill()


@pytest.fixture(scope="module")
def local(folder: str) -> LocalTeacher:
    made = LocalTeacher(folder, "float32")
    made.load(torch.device("cpu"))
    return made


@pytest.fixture
def teacher(server: RealServer, folder: str) -> ServerTeacher:
    made = ServerTeacher(folder, [server.url], KEY)
    made.load(torch.device("cpu"))
    return made


@pytest.fixture(scope="module")
def batch() -> RolloutBatch:
    drawn = torch.Generator().manual_seed(0)
    made = [torch.randint(2, 16, (n,), generator=drawn).tolist() for n in (9, 1, 30)]
    return collate(PROMPTS, made, [0, 1, 2], pad_id=0)


def test_scores_are_those_of_a_local_teacher(
    teacher: ServerTeacher, local: LocalTeacher, batch: RolloutBatch
) -> None:
    asked = torch.randint(0, 16, (*batch.completion_ids.shape, 3))
    for topk_ids in (None, asked):
        ours, theirs = teacher.score(batch, topk_ids), local.score(batch, topk_ids)
        real = batch.completion_mask
        assert ours.entropy is None and ours.topk_ids is not None and theirs.topk_ids is not None
        assert ours.logprobs.shape == theirs.logprobs.shape
        assert float((ours.logprobs - theirs.logprobs).abs().max()) < BOUND
        assert torch.equal(ours.topk_ids[real], theirs.topk_ids[real])
        assert (ours.topk_logprobs is None) == (topk_ids is None)
        if ours.topk_logprobs is not None and theirs.topk_logprobs is not None:
            gap = (ours.topk_logprobs - theirs.topk_logprobs)[real].abs().max()
            assert ours.topk_logprobs.shape == asked.shape and float(gap) < BOUND


def test_ids_that_the_teacher_does_not_have(
    teacher: ServerTeacher, local: LocalTeacher, batch: RolloutBatch
) -> None:
    asked = torch.full((*batch.completion_ids.shape, 2), 99)
    asked[..., 0] = 4
    found = teacher.score(batch, asked).topk_logprobs
    assert found is not None and bool((found[batch.completion_mask][:, 1] == -torch.inf).all())
    strange = collate([[3]], [[99]], [0], pad_id=0)
    with pytest.raises(
        TrainingStopped, match=r"must be below 16, the rows of the teacher's head: got 99"
    ):
        teacher.accept(strange)
    with pytest.raises(
        TrainingStopped, match=r"must fit into the context of 128 tokens of .*got 141"
    ):
        teacher.accept(collate([[3] * 100], [[4] * 40], [0], pad_id=0))


def test_scores_can_be_cached(teacher: ServerTeacher, batch: RolloutBatch, tmp_path: Path) -> None:
    cached = CachedTeacher(teacher, str(tmp_path / "scores.db"))
    cached.load(torch.device("cpu"))
    first, second = cached.score(batch), cached.score(batch)
    assert (cached.hits, cached.misses) == (3, 3)
    assert first.entropy is None and second.entropy is None
    assert torch.equal(first.logprobs, second.logprobs)


def test_after_its_own_prompts_a_server_scores_as_a_local_teacher(
    teacher: ServerTeacher, local: LocalTeacher, batch: RolloutBatch, folder: str, tmp_path: Path
) -> None:
    tokenizer, texts = load_tokenizer(folder), ["06,04#046", "", "10,10#100"]
    attempts = [
        SimpleNamespace(
            row={"prompt": tokenizer.decode(ids), "solution": text},
            prompt_ids=ids,
            completion=SimpleNamespace(ids=row[mask].tolist()),
        )
        for ids, text, row, mask in zip(
            PROMPTS, texts, batch.completion_ids, batch.completion_mask, strict=True
        )
    ]
    prompt = TeacherPrompt(ColumnContext("solution"), "{context}#{prompt}")
    cached = CachedTeacher(teacher, str(tmp_path / "own.db"))
    found = []
    for inner in (local, teacher, cached, cached):
        own: Any = PromptedTeacher(inner, prompt)
        own.check(tokenizer, folder)
        own.load(torch.device("cpu"))
        read = with_prompts(batch, own.own_prompts([Group([one]) for one in attempts]))
        assert read.has_context is not None and read.has_context.tolist() == [True, False, True]
        found.append(own.score(read).logprobs)
    for scores in found[1:]:
        assert float((scores - found[0]).abs().max()) < BOUND
    assert torch.equal(found[2], found[3]) and (cached.hits, cached.misses) == (3, 3)
    # Without a context the prompt is the student's; with one it is another.
    gap = (found[0] - local.score(batch).logprobs).abs().amax(1)
    assert float(gap[1]) < BOUND < float(gap[[0, 2]].min())


def test_the_teachers_completions_come_from_the_same_server(
    server: RealServer, local: LocalTeacher
) -> None:
    engine = VLLMTeacherEngine([server.url], KEY)
    engine.setup(local.weights(), EOS, 0)
    engine.update_weights(local.weights(), 7)
    groups = engine.generate(PROMPTS, [[0, 1], [2, 3], [4, 5]], Sampling(24))
    rows = [(p, c) for p, group in zip(PROMPTS, groups, strict=True) for c in group]
    made = collate([p for p, _ in rows], [c.ids for _, c in rows], [0] * 6, pad_id=0)
    scores = local.score(made).logprobs
    for (_, c), row in zip(rows, scores, strict=True):
        assert c.logprobs == pytest.approx(row[: len(c.ids)].tolist(), abs=BOUND)
    assert any(c.ids[-1] == EOS for _, c in rows)


def test_its_weights_cannot_be_changed(server: RealServer, local: LocalTeacher) -> None:
    engine = VLLMServerEngine([server.url], KEY)
    with pytest.raises(TrainingStopped, match=r"collective_rpc: got status 404.*development mode"):
        engine.setup(local.weights(), EOS, 0)


def test_wrong_key_tokenizer_and_temperature(
    server: RealServer, teacher: ServerTeacher, tmp_path: Path, batch: RolloutBatch
) -> None:
    device = torch.device("cpu")
    with pytest.raises(TrainingStopped, match=rf"{server.url} .*/v1/models: got status 401"):
        ServerTeacher(teacher.model, [server.url], "another").load(device)
    other = save_reordered(tmp_path / "other")
    with pytest.raises(
        TrainingStopped, match=rf"{server.url} must have the tokenizer of `model` {other}, "
    ):
        ServerTeacher(other, [server.url], KEY).load(device)
    with pytest.raises(ConfigurationError, match=r"`temperature` must be 1 with a ServerTeacher"):
        teacher.score(batch.replace(temperature=0.7))


def save_reordered(folder: Path) -> str:
    """The teacher's folder with a tokenizer whose ids mean something else."""
    import json
    import shutil

    shutil.copytree(TinyModel("teacher").path(), folder)
    path = folder / "tokenizer.json"
    content: Any = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]
    path.write_text(json.dumps(content))
    return str(folder)


def test_luffy_with_teacher_and_completions_from_the_server(
    server: RealServer, folder: str, tmp_path: Path
) -> None:
    flags = [
        f"--config={ROOT / 'configs/luffy.yaml'}",
        "--model.teacher.class_path=ServerTeacher",
        f"--model.teacher.init_args.model={folder}",
        f"--model.teacher.init_args.urls=[{server.url}]",
        "--data.teacher_completions.engine.class_path=VLLMTeacherEngine",
        f"--data.teacher_completions.engine.init_args.urls=[{server.url}]",
        "--data.rollout.prompts_per_rollout=8",
        "--data.val_prompts.size=16",
        "--trainer.max_steps=4",
        "--report.evaluate_teacher=false",
        "--report.export=false",
    ]
    out = run(["kdrl_lightning", "fit", *flags], tmp_path, timeout=200, VLLM_API_KEY=KEY)
    assert out.returncode == 0, out.stderr[-3000:]
