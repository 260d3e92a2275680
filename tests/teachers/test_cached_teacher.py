"""Teacher scores on disk: read bit for bit, and only if everything they depend on is the same."""

from __future__ import annotations

import runpy
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.processes.ready import FORKS
from helpers.short_runs import fit, make_data, make_module
from kdrl_lightning import GKD, KDRL, CachedTeacher, KDRLModule, LocalTeacher, RoutedTeacher
from kdrl_lightning.cli.main import KDRLCLI
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses.logprobs import TokenScores
from kdrl_lightning.rollout_batch import RolloutBatch, collate
from kdrl_lightning.teachers.cached import _open

pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [8], [3, 3]]
COMPLETIONS = [[9, 1], [4, 4, 4, 1], [2]]


def batch_of(completions: list[list[int]] = COMPLETIONS, **changes: Any) -> RolloutBatch:
    return collate(PROMPTS, completions, [0, 1, 2], pad_id=0).replace(**changes)


def cached(folder: str, path: Path) -> CachedTeacher:
    made = CachedTeacher(LocalTeacher(folder), str(path / "deep" / "scores.db"))
    made.load(CPU)
    return made


def local(folder: str) -> LocalTeacher:
    made = LocalTeacher(folder)
    made.load(CPU)
    return made


def counts(teacher: CachedTeacher) -> tuple[int, int]:
    return teacher.hits, teacher.misses


def same(ours: TokenScores, theirs: TokenScores) -> None:
    for name in TokenScores._fields:
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), name


@pytest.mark.parametrize("asked", [False, True])
def test_the_second_time_everything_is_found(
    tmp_path: Path, teacher_folder: str, asked: bool
) -> None:
    batch = batch_of()
    ids = torch.randint(0, 16, (*batch.completion_ids.shape, 2)) if asked else None
    teacher = cached(teacher_folder, tmp_path)
    first = teacher.score(batch, ids)
    assert counts(teacher) == (0, 3)
    same(first, teacher.teacher.score(batch, ids))
    again = cached(teacher_folder, tmp_path)  # another run
    same(again.score(batch, ids), first)
    assert counts(again) == (3, 0)


def test_a_found_score_asks_no_teacher(tmp_path: Path, teacher_folder: str) -> None:
    teacher = cached(teacher_folder, tmp_path)
    first = teacher.score(batch_of())
    teacher.teacher.score = None  # type: ignore[method-assign, assignment]
    same(teacher.score(batch_of()), first)


def test_rows_are_found_in_any_company(tmp_path: Path, teacher_folder: str) -> None:
    teacher = cached(teacher_folder, tmp_path)
    whole = teacher.score(batch_of())
    part = batch_of().select([2, 0])
    got = teacher.score(part)
    assert counts(teacher) == (2, 3)
    assert torch.equal(got.logprobs, whole.logprobs[[2, 0], :2])
    # A new row is in one batch with known rows.
    mixed = teacher.score(batch_of([[9, 1], [4, 4], [2]]))
    assert counts(teacher) == (4, 4)
    expected = teacher.teacher.score(batch_of([[9, 1], [4, 4], [2]]))
    torch.testing.assert_close(mixed.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(mixed.entropy, expected.entropy, rtol=0, atol=1e-5)


def test_the_same_row_twice_in_a_batch(tmp_path: Path, teacher_folder: str) -> None:
    teacher = cached(teacher_folder, tmp_path)
    twice = batch_of().select([1, 1])
    first = teacher.score(twice)
    same(teacher.score(twice), first)
    assert torch.equal(first.logprobs[0], first.logprobs[1])


def test_other_content_is_not_found(
    tmp_path: Path, teacher_folder: str, student_folder: str
) -> None:
    teacher, batch = cached(teacher_folder, tmp_path), batch_of()
    ids = torch.arange(2).expand(*batch.completion_ids.shape, 2)
    teacher.score(batch)
    for other, asked in (
        (batch_of(temperature=0.5), None),
        (batch, ids),
        (batch, ids + 1),
        (batch_of([[9, 2], [4, 4, 5, 1], [3]]), None),
        (batch_of(teacher_route=torch.tensor([1, 1, 1])), None),
        # The same tokens, cut elsewhere between prompt and completion.
        (collate([[5, 6], [8, 4], [3]], [[7, 9, 1], [4, 4, 1], [3, 2]], [0, 1, 2], pad_id=0), None),
    ):
        before = counts(teacher)
        got = teacher.score(other, asked)
        assert counts(teacher) == (before[0], before[1] + 3)
        same(got, teacher.teacher.score(other, asked))
    other_weights = cached(student_folder, tmp_path)
    got = other_weights.score(batch)
    assert counts(other_weights) == (0, 3)
    same(got, local(student_folder).score(batch))


def test_the_fingerprint_follows_the_weights(teacher_folder: str, student_folder: str) -> None:
    teacher, other = local(teacher_folder), local(student_folder)
    before = teacher.fingerprint()
    assert before == local(teacher_folder).fingerprint() != other.fingerprint()
    half = LocalTeacher(teacher_folder, "bfloat16")
    half.load(CPU)
    assert half.fingerprint() != before
    for _, tensor in teacher.weights().named_tensors():
        with torch.no_grad():
            tensor.add_(0.001)
        assert teacher.fingerprint() != before
        before = teacher.fingerprint()


def test_weights_and_states_are_the_teachers(tmp_path: Path, teacher_folder: str) -> None:
    teacher = cached(teacher_folder, tmp_path)
    assert teacher.generates
    assert teacher.weights().model is teacher.teacher.weights().model  # type: ignore[union-attr]
    assert teacher.fingerprint() == teacher.teacher.fingerprint()
    ours, theirs = teacher.states(batch_of()), teacher.teacher.states(batch_of())
    assert torch.equal(ours.hidden, theirs.hidden)
    assert torch.equal(ours.head.weight, theirs.head.weight)
    assert teacher.route({"any": "row"}) == 0


def test_two_connections_share_one_file(tmp_path: Path, teacher_folder: str) -> None:
    first, second = cached(teacher_folder, tmp_path), cached(teacher_folder, tmp_path)
    kept = first.score(batch_of())
    same(second.score(batch_of()), kept)
    assert counts(second) == (3, 0)
    second.score(batch_of(temperature=2.0))
    first.score(batch_of(temperature=2.0))
    assert counts(first) == (3, 3)


WRITER = """
from pathlib import Path
from kdrl_lightning.teachers.cached import _open
database = _open(Path({file!r}))
for i in range(200):
    with database:
        database.execute("INSERT OR REPLACE INTO scores VALUES (?, ?)", (f"other{{i}}", b"x"))
"""


def test_two_processes_write_one_file(tmp_path: Path) -> None:
    file, script = tmp_path / "scores.db", tmp_path / "writer.py"
    script.write_text(WRITER.format(file=str(file)))
    other = FORKS.start(runpy.run_path, (str(script),))
    database, mine = _open(file), 0
    while other.exitcode is None or mine < 200:
        with database:
            row = (f"mine{mine}", b"x")
            database.execute("INSERT OR REPLACE INTO scores VALUES (?, ?)", row)
        mine += 1
    assert other.exitcode == 0
    assert database.execute("SELECT COUNT(*) FROM scores").fetchone() == (200 + mine,)
    database.close()


def test_a_broken_file_is_refused(tmp_path: Path, teacher_folder: str) -> None:
    file = tmp_path / "scores.db"
    file.write_bytes(b"this is no database" * 100)
    teacher = CachedTeacher(LocalTeacher(teacher_folder), str(file))
    with pytest.raises(ConfigurationError, match=r"`path` must be a SQLite file .*scores\.db") as e:
        teacher.load(CPU)
    assert "\n" not in str(e.value)
    with pytest.raises(ConfigurationError, match=r"`path` must be a file: got .*is a folder\."):
        CachedTeacher(LocalTeacher(teacher_folder), str(tmp_path))


def test_a_teacher_that_is_not_loaded_says_so(tmp_path: Path, teacher_folder: str) -> None:
    with pytest.raises(RuntimeError, match=r"the teacher is not loaded: call load\(\) first"):
        CachedTeacher(LocalTeacher(teacher_folder), str(tmp_path / "a.db")).score(batch_of())


def weights(module: KDRLModule) -> torch.Tensor:
    return torch.cat([v.flatten() for _, v in module.weights().named_tensors()])


@pytest.mark.parametrize("objective", [KDRL(0.5), GKD(), GKD(top_k=3)], ids=["k2", "full", "top_k"])
def test_a_run_is_the_same_with_and_without(
    tmp_path: Path, student_folder: str, teacher_folder: str, objective: Any
) -> None:
    def run(teacher: Any) -> torch.Tensor:
        module = make_module(student_folder, teacher, objective)
        fit(tmp_path, module, make_data(val_prompts=None), max_steps=2)
        return weights(module)

    def again() -> CachedTeacher:
        return CachedTeacher(LocalTeacher(teacher_folder), str(tmp_path / "scores.db"))

    plain, cold, warm = LocalTeacher(teacher_folder), again(), again()
    expected = run(plain)
    assert torch.equal(run(cold), expected)
    assert torch.equal(run(warm), expected)
    # A teacher whose whole distributions the updates compare with is not asked for scores.
    assert (cold.misses > 0) == (objective.divergence is None)
    assert counts(warm) == (cold.hits + cold.misses, 0)


def test_behind_a_routed_teacher(tmp_path: Path, student_folder: str, teacher_folder: str) -> None:
    def make() -> RoutedTeacher:
        path = str(tmp_path / "scores.db")
        made = RoutedTeacher(
            {
                "a": CachedTeacher(LocalTeacher(teacher_folder), path),
                "b": CachedTeacher(LocalTeacher(student_folder), path),
            }
        )
        made.load(CPU)
        return made

    batch = batch_of(teacher_route=torch.tensor([0, 1, 0]))
    first, second = make(), make()
    expected = first.score(batch)
    same(second.score(batch), expected)
    assert [counts(t) for t in second.teachers.values()] == [(2, 0), (1, 0)]  # type: ignore[arg-type]


def test_from_a_configuration(tmp_path: Path, student_folder: str, teacher_folder: str) -> None:
    plain = {"class_path": "LocalTeacher", "init_args": {"model": teacher_folder}}
    path = str(tmp_path / "scores.db")
    kept = {"class_path": "CachedTeacher", "init_args": {"teacher": plain, "path": path}}
    routed = {
        "class_path": "RoutedTeacher",
        "init_args": {"teachers": {"a": kept, "b": plain}, "column": "which"},
    }
    config = {
        "model": {
            "student": student_folder,
            "teacher": routed,
            "objective": {"class_path": "KDRL"},
        },
        "data": {
            "train_prompts": [{"prompt": "1+2=", "which": "a"}],
            "reward": "helpers.short_runs.some_reward",
        },
        "trainer": {"accelerator": "cpu", "logger": False, "max_steps": 1},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    cli = KDRLCLI.run(["--config", str(file)], instantiate_only=True)
    teacher = cli.model.teacher
    assert isinstance(teacher, RoutedTeacher) and teacher.column == "which"
    assert isinstance(teacher.teachers["a"], CachedTeacher)
    assert isinstance(teacher.teachers["a"].teacher, LocalTeacher)
    assert isinstance(teacher.teachers["b"], LocalTeacher)
    assert teacher.teachers["a"].path == path


def test_another_precision_is_another_key(teacher_folder: str, tmp_path: Path) -> None:
    cached = CachedTeacher(LocalTeacher(teacher_folder), str(tmp_path / "scores.db"))
    cached.load(torch.device("cpu"))
    batch = collate([[5, 6]], [[7, 8]], [0], pad_id=0)
    cached.score(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = cached.score(batch)
        assert (cached.hits, cached.misses) == (0, 2)
        torch.testing.assert_close(half.logprobs, cached.teacher.score(batch).logprobs)


def test_a_damaged_row_is_scored_again(teacher_folder: str, tmp_path: Path) -> None:
    path = str(tmp_path / "scores.db")
    cached = CachedTeacher(LocalTeacher(teacher_folder), path)
    cached.load(torch.device("cpu"))
    batch = collate([[5, 6]], [[7, 8]], [0], pad_id=0)
    before = cached.score(batch).logprobs
    with sqlite3.connect(path) as other:
        other.execute("UPDATE scores SET scores = x'00'")
    assert torch.equal(cached.score(batch).logprobs, before)
    assert (cached.hits, cached.misses) == (0, 2)
