"""Calls in other processes: one that hangs or dies does not affect the others."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.rewards import judged_elsewhere
from helpers.rewards.judged_elsewhere import answer, with_children, with_orphan
from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.rewards import RewardFailures, RewardFunction, RewardRunner, Sample, Verdict
from kdrl_lightning.rewards.processes.workers import WorkerPool


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(answer, seconds=0.5, workers=2)
    yield pool
    pool.close()


def alive(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    # A process that has ended but has not been waited for is a zombie.
    return "Z" not in status.rpartition(")")[2].split()[0]


def gone(process: int) -> bool:
    until = time.monotonic() + 20
    while alive(process) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(process)


def test_one_bad_call_takes_nothing_else_with_it(pool: WorkerPool) -> None:
    asked = [1, "spin", "raise", 2, "exit", "memory", "deep", "odd", "unreadable", "sleep", 3]
    got = pool.map([*asked, lambda: None, 4])
    assert [got[i] for i in (0, 3, 10, 12)] == [1, 2, 3, 4]
    for i in (1, 9):
        assert repr(got[i]) == "TimeoutError('no verdict in 0.5 s')"
    assert repr(got[2]) == "KeyError('why')"
    assert repr(got[4]) == "RuntimeError('the process that judged it has died')"
    assert [type(got[i]) for i in (5, 6)] == [MemoryError, RecursionError]
    assert repr(got[7]) == "RuntimeError('TwoArguments: one')"
    assert isinstance(got[8], Exception) and isinstance(got[11], Exception)


def test_results_are_in_the_order_of_the_arguments(pool: WorkerPool) -> None:
    asked = [text * 70000 if i % 50 == 0 else i for i, text in enumerate("é" * 300)]
    assert pool.map(asked) == asked
    assert pool.map([]) == []


def test_a_worker_that_hung_is_replaced(pool: WorkerPool) -> None:
    before = set(pool.map(["who"] * 20))
    pool.map(["spin"] * 2)
    after = set(pool.map(["who"] * 20))
    assert after and not before & after
    assert all(gone(process) for process in before)
    assert os.getpid() not in before | after


@pytest.mark.parametrize("whole", [False, True])
def test_a_call_whose_process_is_killed_is_made_once_more(tmp_path: Path, whole: bool) -> None:
    pool = WorkerPool(answer, seconds=5.0, workers=2)
    asked = [("die once", str(tmp_path / str(i)), whole) if i % 3 == 1 else i for i in range(9)]
    assert pool.map(asked) == asked
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "4", "7"]
    assert pool.map(list(range(6))) == list(range(6))
    pool.close()


@pytest.mark.parametrize("whole", [False, True])
def test_processes_killed_between_two_calls_are_replaced(whole: bool) -> None:
    pool = WorkerPool(answer, seconds=5.0, workers=1)
    assert pool.map([1, 2]) == [1, 2]
    for worker in list(pool._workers):
        if whole:
            worker.process.kill()
            worker.process.wait()
        os.kill(worker.child, signal.SIGKILL)
    assert pool.map(list(range(40))) == list(range(40))
    assert len(pool._workers) == 1
    pool.close()


def test_an_answer_to_an_earlier_try_is_not_taken_for_another_calls() -> None:
    pool = WorkerPool(answer, seconds=5.0, workers=1)
    assert pool.map([1]) == [1]
    (worker,) = pool._workers
    worker.pipe.send((0, "stale"))  # as if its call had been handed over twice
    assert pool.map(list(range(20))) == list(range(20))
    pool.close()


def test_a_process_that_ends_before_it_is_ready_stops_the_run_in_one_line() -> None:
    pool = WorkerPool(answer, seconds=5.0, workers=2)
    pool.target = ("helpers.rewards.ends_at_once", "answer")
    words = (
        r"^the worker processes of helpers\.rewards\.ends_at_once\.answer must start: "
        r"got 3 that ended before they were ready\. "
        r"Check that its module can be imported, and the machine's memory\.$"
    )
    with pytest.raises(TrainingStopped, match=words):
        pool.map([1, 2, 3])
    assert pool._workers == []


def test_closing_ends_the_processes_and_the_next_call_starts_others(pool: WorkerPool) -> None:
    (process,) = pool.map(["who"])
    other = pickle.loads(pickle.dumps(pool))  # processes do not travel
    pool.close()
    assert gone(process)
    assert pool.map([1]) == [1]
    assert other._workers == [] and other.target == pool.target


def test_an_interrupt_leaves_no_stale_answers(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(calls: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "_collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.map([1, 2, 3])
    monkeypatch.undo()
    assert pool.map([4, 5]) == [4, 5]


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    # No `if __name__ == "__main__"`: starting a worker must not run the script again.
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal\n"
        "from helpers.rewards.judged_elsewhere import answer\n"
        "from kdrl_lightning.rewards.processes.workers import WorkerPool\n"
        "pool = WorkerPool(answer, 5.0, 1)\n"
        "print(pool.map(['who'])[0], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = os.pathsep.join(sys.path)
    out = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "PYTHONPATH": path}, capture_output=True
    )
    (process,) = out.stdout.split()
    assert gone(int(process))


def children_of(path: Path) -> list[int]:
    until = time.monotonic() + 60
    while not (path.exists() and len(path.read_text().split()) == 2) and time.monotonic() < until:
        time.sleep(0.02)
    return [int(process) for process in path.read_text().split()]


def sleepers() -> set[int]:
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    return {int(line.split()[0]) for line in found.splitlines() if "time.sleep(1000)" in line}


def test_what_a_killed_call_has_started_ends_with_it(tmp_path: Path) -> None:
    before = sleepers()
    pool = WorkerPool(with_children, seconds=5.0, workers=1)
    hung, ended = pool.map([f"{tmp_path}/a|hang", f"{tmp_path}/b|exit"])
    assert isinstance(hung, TimeoutError) and isinstance(ended, RuntimeError)
    for name in ("a", "b"):
        assert all(gone(process) for process in children_of(tmp_path / name))
    (process,) = pool.map([f"{tmp_path}/c|"])  # left behind by a call that returned
    assert alive(process)
    pool.close()
    assert all(gone(process) for process in children_of(tmp_path / "c"))
    assert not sleepers() - before  # nor what has a separate session and parent


def test_an_orphan_that_ends_is_no_zombie() -> None:
    pool = WorkerPool(with_orphan, seconds=60.0, workers=1)
    (orphan,) = pool.map([""])
    until = time.monotonic() + 20
    while Path(f"/proc/{orphan}").exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert not Path(f"/proc/{orphan}").exists()
    assert pool.map([""])  # and the worker goes on
    pool.close()


def test_a_call_ends_with_a_training_process_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from helpers.rewards.judged_elsewhere import with_children\n"
        "from kdrl_lightning.rewards.processes.workers import WorkerPool\n"
        f"WorkerPool(with_children, 500.0, 1).map(['{tmp_path}/x|hang'])\n"
    )
    path = os.pathsep.join(sys.path)
    trainer = subprocess.Popen([sys.executable, script], env={**os.environ, "PYTHONPATH": path})
    processes = children_of(tmp_path / "x")
    assert len(processes) == 2 and all(alive(process) for process in processes)
    trainer.kill()
    trainer.wait()
    assert all(gone(process) for process in processes)


def test_a_worker_loads_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, kdrl_lightning.rewards.math; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_a_function_that_cannot_be_imported_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = WorkerPool(answer, 1.0, 1)
    pool.target = ("helpers.rewards.judged_elsewhere", "nothing")
    with pytest.raises(AttributeError, match="nothing"):
        pool.map([1])
    words = r"^`function` must be importable from another process: got .*<locals>.*Put it at"
    with pytest.raises(ConfigurationError, match=words):
        WorkerPool(lambda x: x, 1.0, 1)


def test_a_worker_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrl_lightning.rewards.processes.workers.START_SECONDS", 0.0)
    with pytest.raises(TimeoutError, match=r"a worker process did not start in 0 s"):
        WorkerPool(answer, 1.0, 1).map([1])


@pytest.mark.parametrize(
    ("seconds", "workers", "words"),
    [(0.0, 1, "`time_limit_s` must be in"), (1.0, 0, r"`workers` must be in \[1, 1024\]: got 0")],
)
def test_limits_that_cannot_be_are_refused(seconds: float, workers: int, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        WorkerPool(answer, seconds, workers)


def samples(*texts: str) -> list[Sample]:
    return [Sample(text, [], {}) for text in texts]


@pytest.mark.filterwarnings("ignore:the reward failed on .* of a rollout:UserWarning")
def test_a_function_that_hangs_fails_or_is_nan_is_counted() -> None:
    function = RewardFunction(judged_elsewhere.reward, time_limit_s=0.5, workers=2)
    runner = RewardRunner(function, RewardFailures(0.5, -1.0))
    bad = Verdict(-1.0, False)
    good = [Verdict(n, False, {"length": n}) for n in (2.0, 0.0, 5.0, 3.0)]
    texts = ("ab", "spin", "", "raise", "sieve", "nan", "abc", "exit")
    assert runner(samples(*texts)) == [good[0], bad, good[1], bad, good[2], bad, good[3], bad]
    assert runner.failures == 4
    runner.close()


def test_a_function_of_a_batch_in_this_process_and_in_another() -> None:
    for seconds in (None, 0.5):
        function = RewardFunction(judged_elsewhere.batch, batch=True, time_limit_s=seconds)
        assert function.judge(samples("a", "b", "c")) == [1.0] * 3
        with pytest.raises(KeyError, match="why"):
            function(samples("raise")[0])
        runner = RewardRunner(function, RewardFailures(1.0))
        with pytest.warns(UserWarning, match="2 of 2 .*ValueError: 1 results for 2 samples"):
            assert runner(samples("short", "b")) == [Verdict(0.0, False)] * 2
        function.close()


def test_a_function_without_a_time_limit_runs_here() -> None:
    seen: list[str] = []

    def here(sample: Sample) -> float:
        seen.append(sample.text)
        return 1 / len(sample.text)

    function = RewardFunction(here, time_limit_s=None)
    first, second = function.judge(samples("ab", ""))
    assert first == 0.5 and isinstance(second, ZeroDivisionError)
    assert seen == ["ab", ""]
    function.close()
