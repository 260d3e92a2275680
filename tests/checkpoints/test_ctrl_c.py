"""Ctrl-C: the first finishes the step and saves, the second stops at once; exit code 130."""

from __future__ import annotations

import csv
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.loggers import CSVLogger

from helpers.processes.killed_runs import fit as fit_in_processes
from helpers.processes.killed_runs import killer
from helpers.processes.killed_runs import start as start_process
from helpers.program import refusal
from helpers.short_runs import make_data, make_module, make_trainer
from kdrl_lightning import GRPO, KDRLModule, __main__
from kdrl_lightning.callbacks import FSDPCheckpoint
from kdrl_lightning.checkpoints.reader import read_metadata
from kdrl_lightning.errors import Interrupted, TrainingStopped
from kdrl_lightning.trainer import internals, strategies

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*of the (completions|groups):UserWarning",
    "ignore:The number of training batches:UserWarning",
)


@pytest.fixture(autouse=True)
def _takes_ctrl_c() -> Iterator[None]:
    """A shell lets what runs in its background ignore Ctrl-C, and so would these runs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press(times: int = 1, number: int = signal.SIGINT) -> None:
    for _ in range(times):
        os.kill(os.getpid(), number)


class Presses(pl.Callback):
    """Presses Ctrl-C once a hook is called at a step."""

    def __init__(self, hook: str, step: int, times: int = 1, number: int = signal.SIGINT) -> None:
        self.step, self.times, self.number = step, times, number
        setattr(self, hook, self.act)

    def act(self, trainer: Any, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.step:
            self.step = -1
            press(self.times, self.number)


def fit(root: Path, student: str, *callbacks: pl.Callback) -> None:
    trainer = make_trainer(
        root, callbacks=[*callbacks, FSDPCheckpoint()], enable_checkpointing=True
    )
    trainer.fit(make_module(student, None, GRPO()), datamodule=make_data())


MOMENTS = [
    ("on_train_batch_start", 2, 3),
    ("on_before_backward", 2, 3),
    ("on_before_optimizer_step", 2, 3),
    ("on_train_batch_end", 3, 3),
    ("on_validation_start", 4, 5),  # the ranks have agreed on this step already
    ("on_validation_batch_end", 4, 5),
    ("on_save_checkpoint", 4, 5),
    ("on_train_end", 8, 8),
]


@pytest.mark.parametrize(("hook", "step", "saved"), MOMENTS)
def test_the_first_saves_after_the_step(
    tmp_path: Path, student_folder: str, capfd: Any, hook: str, step: int, saved: int
) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    words = (
        rf"stopped by Ctrl-C after step {saved}: saved .*step={saved:08d}\.ckpt\. Continue with `-"
    )
    with pytest.raises(Interrupted, match=words) as error:
        fit(tmp_path, student_folder, Presses(hook, step))
    assert error.value.number == signal.SIGINT
    file = tmp_path / f"checkpoints/step={saved:08d}.ckpt"
    assert read_metadata(str(file))["global_step"] == saved
    assert (
        "Ctrl-C: saving after this optimizer step; press it again to stop at once"
        in capfd.readouterr().err
    )
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.fixture
def sighup() -> Iterator[None]:
    """SIGHUP as a terminal gives it, also if the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("sighup")
def test_a_terminal_that_is_closed_saves_like_sigterm(tmp_path: Path, student_folder: str) -> None:
    before = signal.getsignal(signal.SIGHUP)
    words = r"stopped by SIGHUP after step 3: saved .*step=00000003\.ckpt\. Continue with `-"
    with pytest.raises(Interrupted, match=words) as error:
        fit(tmp_path, student_folder, Presses("on_before_backward", 2, number=signal.SIGHUP))
    assert error.value.number == signal.SIGHUP and signal.getsignal(signal.SIGHUP) == before


def test_under_nohup_the_run_goes_on(tmp_path: Path, student_folder: str) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        fit(tmp_path, student_folder, Presses("on_before_backward", 2, number=signal.SIGHUP))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("sighup")  # the other process inherits it
def test_output_to_a_closed_terminal_is_dropped() -> None:
    """The handler runs in another process, whose output is a terminal that is then closed."""
    ours, theirs = pty.openpty()
    code = "import os, signal\nfrom kdrl_lightning.trainer.stop_signals import StopSignals\n"
    code += "import time\nstop = StopSignals(str)\nstop.listen(True)\nos.write(1, b'ready')\n"
    code += "while not stop.agreed(lambda number, _: number): time.sleep(0.01)\n"
    code += "time.sleep(1)\n"  # until the terminal is closed
    code += "print('x' * 9999, flush=True)\nos._exit(7)\n"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs)
    try:
        os.close(theirs)
        while b"ready" not in os.read(ours, 1000):
            pass
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        os.close(ours)
        assert process.wait(60) == 7
    finally:
        process.kill()


def test_a_run_that_ends_gives_the_signals_back(tmp_path: Path, student_folder: str) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    fit(tmp_path, student_folder)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.fixture(autouse=True)
def _keep_handler() -> Any:
    """After an interrupt Lightning ignores Ctrl-C for good."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("hook", "times", "words"),
    [
        ("Trainer._run_sanity_check", 1, r"stopped by Ctrl-C: nothing was saved\."),
        ("on_before_backward", 1, r"stopped by Ctrl-C after step 3: saved .*step=00000003\.ckpt\."),
        ("on_before_backward", 2,
         r"stopped at once by Ctrl-C: the last checkpoint is .*step=00000002\.ckpt\."),
    ],
)  # fmt: skip
def test_the_command_line_says_so_and_exits_with_130(
    start: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    hook: str,
    times: int,
    words: str,
) -> None:
    if hook.startswith("Trainer."):
        monkeypatch.setattr(pl.Trainer, "_run_sanity_check", lambda self: press())
    else:
        press_at = Presses("at", 2, times)
        act = lambda module, *_: press_at.act(module.trainer)  # noqa: E731
        monkeypatch.setattr(KDRLModule, hook, act)
    line = refusal(start, capsys, "fit", "--trainer.max_steps=6", code=130)
    assert re.match(f"error: {words}", line)


@pytest.mark.parametrize(
    ("place", "steps", "words"),
    [
        ("save_student", 4, r"the last checkpoint is .*step=00000004\.ckpt\."),
        ("RunReport.on_train_start", 4, r"nothing was saved\."),
        ("RunReport.on_train_start", 6, r"the last checkpoint is .*step=00000004\.ckpt\."),
    ],
)
def test_an_export_or_a_first_measurement_that_is_stopped_names_the_last_checkpoint(
    start: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    steps: int,
    words: str,
) -> None:
    flags = ["fit", "--trainer.max_steps=4"]
    if steps > 4:  # a run that goes on
        start(*flags)
        flags = ["fit", f"--trainer.max_steps={steps}", "--ckpt_path=last"]

    def pressed(*_: Any, **__: Any) -> None:
        press()

    monkeypatch.setattr(f"kdrl_lightning.callbacks.report.{place}", pressed)
    line = refusal(start, capsys, *flags, code=130)
    assert re.fullmatch(f"error: stopped by Ctrl-C: {words}", line), line
    assert not list(Path().rglob("version_0/student/model.safetensors")) or steps > 4


@pytest.mark.parametrize("kind", [KeyError, TrainingStopped, ValueError])
@pytest.mark.parametrize(("number", "name", "code"), [(2, "Ctrl-C", 130), (15, "SIGTERM", 143)])
def test_an_engine_that_the_same_signal_ended_is_no_error_of_the_program(
    start: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Exception],
    number: int,
    name: str,
    code: int,
) -> None:
    def act(module: Any, *_: Any) -> None:
        if module.trainer.global_step == 2:
            os.kill(os.getpid(), number)
            raise kind("the engine is gone")

    monkeypatch.setattr(KDRLModule, "on_before_backward", act)
    line = refusal(start, capsys, "fit", "--trainer.max_steps=6", code=code)
    words = rf"error: stopped by {name} within a step: the last checkpoint is .*=00000002\.ckpt\."
    assert re.fullmatch(words, line)


@pytest.mark.parametrize("command", ["validate", "evaluate", "export", "serve"])
def test_other_subcommands_stop_at_once(
    start: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for place in ("cli.evaluate.evaluate", "cli.serve.serve", "__main__.run_export"):
        monkeypatch.setattr(f"kdrl_lightning.{place}", interrupted)
    monkeypatch.setattr(pl.Trainer, "_run_stage", lambda self: press())
    line = refusal(start, capsys, command, code=130)
    assert line == "error: stopped by Ctrl-C: nothing was saved."


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_end_together(
    tmp_path: Path, student_folder: str, teacher_folder: str, strategy: str
) -> None:
    flags = (f"--trainer.strategy={strategy}", "--trainer.devices=2")
    press_at = killer("start:4", signal.SIGINT, rank=0)
    _, err = fit_in_processes(
        tmp_path, (student_folder, teacher_folder), *flags, press_at, code=130
    )
    assert err.count("error: stopped by Ctrl-C after step 5: saved ") == 1
    assert err.count("error: ") == 1 and "Traceback" not in err
    assert [p.name for p in tmp_path.rglob("step=*.ckpt")].count("step=00000005.ckpt") == 1


def test_the_last_step_before_a_stop_is_logged(student_folder: str, tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path), flush_logs_every_n_steps=1)
    callbacks = [Presses("on_train_batch_start", 2), FSDPCheckpoint()]
    trainer = make_trainer(
        tmp_path, callbacks=callbacks, enable_checkpointing=True, logger=logger, log_every_n_steps=1
    )
    with pytest.raises(Interrupted, match="after step 3: saved"):
        trainer.fit(make_module(student_folder, None, GRPO()), datamodule=make_data())
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["reward/mean"]]
    assert [int(row["step"]) for row in rows] == [0, 1, 2]  # once each


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_process_that_waits_for_the_others_in_c_ends_with_130_too(
    tmp_path: Path, student_folder: str, teacher_folder: str, strategy: str
) -> None:
    """At the start of the process group no Python handler runs in the first process."""
    flags = (f"--trainer.strategy={strategy}", "--trainer.devices=2")
    process = start_process(tmp_path, (student_folder, teacher_folder), *flags)
    try:
        # As it starts: the second process sleeps as if it read something large.
        slow = "import os, time\nif os.environ.get('LOCAL_RANK') == '1':\n"
        slow += "    open('asleep', 'w').close()\n    time.sleep(600)\n"
        code = tmp_path / "killer.py"
        code.write_text(slow + code.read_text())
        assert process.stderr is not None
        begun = next(line for line in process.stderr if "Initializing distributed" in line)
        assert "GLOBAL_RANK: 0" in begun
        while not (tmp_path / "asleep").exists() and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, err[-3000:]
    assert "error: stopped by Ctrl-C: nothing was saved." in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("codes", "done", "says"),
    [
        ([130, 0], ["waits", "kill", "kill", 130], ""),
        ([-6, 2], ["waits", "kill", "kill", 2], ""),
        ([1, 130], ["waits", "kill", "kill", 130], ""),
        ([None, 1], ["waits", "kill", "kill", 1], ""),
        ([0, -9], ["lightning"], ""),
        ([0, 0], [], ""),
        # Python itself had just begun there, and has no handler yet.
        ([-2, 0], ["waits", "kill", "kill", 130], "error: stopped by Ctrl-C: nothing was saved.\n"),
        ([-15, -9], ["waits", "kill", "kill", 143],
         "error: stopped by SIGTERM: nothing was saved.\n"),
        ([-15, 143], ["waits", "kill", "kill", 143], ""),
    ],
)  # fmt: skip
def test_the_first_process_ends_with_the_code_of_the_others(
    codes: list[int | None],
    done: list[Any],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    calls: list[Any] = []

    def child(code: int | None) -> Any:
        return SimpleNamespace(
            pid=2**30, poll=lambda: code, returncode=code, kill=lambda: calls.append("kill")
        )

    monkeypatch.setattr(os, "_exit", calls.append)
    monkeypatch.setattr("time.sleep", lambda seconds: calls.append("waits"))
    monkeypatch.setattr(internals, "KILL_ALL", lambda observer: calls.append("lightning"))
    before = _ChildProcessObserver._terminate_all
    monkeypatch.setattr(_ChildProcessObserver, "_terminate_all", before)  # and restore it
    strategies.end_with_children()
    _ChildProcessObserver(2**30, [child(code) for code in codes])._run()
    assert calls == done
    assert capfd.readouterr().err == says
    if codes == [None, 1]:  # this process still saves its student
        calls.clear()
        monkeypatch.setattr(strategies, "handles_failure", lambda: True)
        _ChildProcessObserver(2**30, [child(code) for code in codes])._run()
        assert calls == ["waits", *done]
    if codes == [130, 0]:  # in a group none of whose processes has spoken
        monkeypatch.setattr(strategies, "has_spoken", lambda: False)
        _ChildProcessObserver(2**30, [child(code) for code in codes])._run()
        words = "error: stopped by Ctrl-C: `--ckpt_path last` continues from the newest checkpoint"
        assert capfd.readouterr().err.startswith(words)


def test_what_fails_after_ctrl_c_is_no_error_of_the_program(
    start: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> None:
        raise AttributeError("it was not set up yet")

    monkeypatch.setattr(pl.Trainer, "_run_sanity_check", lambda self: press())
    monkeypatch.setattr("kdrl_lightning.callbacks.RunReport.on_exception", fails)
    line = refusal(start, capsys, "fit", code=130)
    assert line == "error: stopped by Ctrl-C: nothing was saved."


def test_ctrl_c_is_ignored_after_lightnings_own_handler_at_exit(tmp_path: Path) -> None:
    """Lightning's ends the process group, and then lets Ctrl-C kill the process."""
    code = "import atexit, os, signal\nfrom kdrl_lightning import __main__ as program\n"
    code += "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n"
    code += "def main():\n    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)\n"
    code += "program.main = main\nprogram.command()\n"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0 and not ended.stderr


@pytest.mark.parametrize("ends", [None, SystemExit(2)])
def test_a_program_that_has_finished_ends_as_it_would(
    ends: SystemExit | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finished() -> None:
        if ends is not None:
            raise ends

    monkeypatch.setattr(__main__, "main", finished)
    before = signal.getsignal(signal.SIGINT)
    try:
        with nullcontext() if ends is None else pytest.raises(SystemExit):
            __main__.command()
        press()  # in Python's own handler a KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)
