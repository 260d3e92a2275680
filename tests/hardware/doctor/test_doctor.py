"""``doctor``: its processes and limits, its verdicts, and which faults its checks detect."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from kdrl_lightning.__main__ import main
from kdrl_lightning.cli import doctor as command
from kdrl_lightning.hardware.doctor import child, program
from kdrl_lightning.hardware.doctor.bench import Bench
from kdrl_lightning.hardware.doctor.checks import attention, head, several, teacher
from kdrl_lightning.hardware.doctor.findings import (
    Finding,
    NotReachedError,
    at_least,
    at_most,
    equal,
    holds,
    info,
)
from kdrl_lightning.hardware.doctor.program import Run
from kdrl_lightning.hardware.doctor.running import CHECKS, Check, Outcome, run
from kdrl_lightning.losses.logprobs import token_scores
from kdrl_lightning.models.scorer import Scorer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("doctor"), CPU, 0)


def failed(findings: Iterator[Finding]) -> list[str]:
    return [f.what for f in findings if f.passed is False]


def test_a_bound_is_kept_or_not_and_nan_keeps_none() -> None:
    assert [at_most("x", v, 1.0).passed for v in (1.0, 1.1, float("nan"))] == [True, False, False]
    assert [at_least("x", v, 1.0).passed for v in (1.0, 0.9, float("nan"))] == [True, False, False]
    assert (equal("x", 1, 2).passed, holds("x", False).passed, info("x", 1).passed) == (
        False,
        False,
        None,
    )


def test_every_check_has_a_module() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS) == 8
    for check in CHECKS:
        __import__(f"kdrl_lightning.hardware.doctor.checks.{check.name}")
        assert callable(sys.modules[f"kdrl_lightning.hardware.doctor.checks.{check.name}"].run)


def test_numbers_are_right_on_this_machine(bench: Bench) -> None:
    for check in (head.run, teacher.placements):
        found = list(check(bench))
        assert not failed(iter(found))
        assert any(f.passed for f in found)


def test_attention_is_right_on_this_machine(bench: Bench) -> None:
    assert failed(attention.shared_prompts(bench)) == []
    for name in ("few-layers", "window"):
        assert attention.padding_gap(bench, Scorer(bench.load(name))) < 1e-5


def test_a_wrong_head_is_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*args: object, **kwargs: object) -> object:
        scores = token_scores(*args, **kwargs)  # type: ignore[arg-type]
        return scores._replace(logprobs=scores.logprobs * 1.001)

    monkeypatch.setattr(head, "token_scores", off)
    (what,) = failed(head.accuracy(bench, "a head", 16, 50, torch.float32))
    assert what == "a head, float32: log-probabilities"


def test_attention_that_sees_padding_is_found(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer(bench.load("few-layers"))
    right = Scorer.forward
    # As padding on the left would: positions start later in short rows.
    monkeypatch.setattr(
        Scorer,
        "forward",
        lambda self, ids, lengths, *rest: right(self, ids.roll(len(ids) - 1, 1), lengths, *rest),
    )
    assert attention.padding_gap(bench, scorer) > attention.BOUNDS[torch.float32]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("kdrl_lightning.hardware.doctor.checks.fake")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_findings_before_an_error_are_kept(fake: ModuleType, tmp_path: Path) -> None:
    def run(bench: Bench) -> Iterator[Finding]:
        yield info("first", 1)
        raise RuntimeError("two\nlines")

    fake.run = run  # type: ignore[attr-defined]
    child.main("fake", tmp_path)
    first, last = map(json.loads, (tmp_path / "fake.jsonl").read_text().splitlines())
    assert first["what"] == "first"
    assert last == {"ended": "failed", "reason": "RuntimeError: two lines"}


def test_what_a_machine_cannot_run_is_not_reached(fake: ModuleType, tmp_path: Path) -> None:
    def run(bench: Bench) -> Iterator[Finding]:
        raise NotReachedError("it needs two GPUs")
        yield

    fake.run = run  # type: ignore[attr-defined]
    child.main("fake", tmp_path)
    (last,) = map(json.loads, (tmp_path / "fake.jsonl").read_text().splitlines())
    assert last == {"ended": "not reached", "reason": "it needs two GPUs"}
    with pytest.raises(NotReachedError, match="it needs two GPUs"):
        next(several.run(SimpleNamespace(gpus=1)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("script", "limit", "verdict", "reason"),
    [
        ("while True: pass", 0.5, "failed", "it took longer than 0.5 s, and was ended"),
        ("import os; os.abort()", 20, "failed", "its process ended with code -6"),
        ("", 20, "failed", "its process ended with code 0"),  # it says nothing: not passed
        ("say('done', '')", 20, "passed", ""),
        ("say('not reached', 'no card')", 20, "not reached", "no card"),
        ("say('failed', 'ValueError: x')", 20, "failed", "ValueError: x"),
        ("find(False); say('done', '')", 20, "failed", "a rule"),
    ],
)
def test_verdict_of_a_process(
    script: str,
    limit: float,
    verdict: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = tmp_path / "program"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, sys\n"
        "name, folder = sys.argv[-2:]\n"
        "def write(line): print(json.dumps(line), file=open(f'{folder}/{name}.jsonl', 'a'))\n"
        "def say(ended, reason): write({'ended': ended, 'reason': reason})\n"
        "def find(ok): write({'what': 'a rule', 'value': '1', 'bound': '0', 'passed': ok})\n"
        f"{script}\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    outcome = run(Check("x", "y", 30), tmp_path, limit)
    assert outcome.verdict == verdict
    assert outcome.reason.startswith(reason)


def outcomes(*verdicts: str) -> dict[str, Outcome]:
    rows = (Finding("gap", "1 nats", "at most 2", True),)
    return {
        check.name: Outcome(check, verdict, 1.0, rows, "because" if verdict != "passed" else "")  # type: ignore[arg-type]
        for check, verdict in zip(CHECKS, verdicts, strict=False)
    }


@pytest.mark.parametrize(
    ("verdicts", "code"), [(("passed", "not reached"), 0), (("passed", "failed"), 1)]
)
def test_exit_code_table_and_json(
    verdicts: tuple[str, ...],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = outcomes(*verdicts)
    monkeypatch.setattr(command, "run", lambda check, folder, limit: made[check.name])
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--only", "start", "head", "--json", str(tmp_path / "found.json")])
    assert ended.value.code == code
    text = capsys.readouterr().out
    assert "gap" in text
    assert "(at most 2) ok" in text
    assert f"head         {verdicts[1]}" in text
    report = json.loads((tmp_path / "found.json").read_text())
    assert [check["verdict"] for check in report["checks"]] == list(verdicts)
    assert report["checks"][0]["findings"][0]["what"] == "gap"
    assert report["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--only", "heads"], "`--only` must name checks: got heads. Choose from start, head,"),
        (["--json", "nowhere/x.json"], "`--json` must name a file in a folder that exists"),
        (["--limit", "soon"], "argument --limit: invalid float value: 'soon'"),
        (["--limit", "0"], "`--limit` must be above 0: got 0.0. Give seconds."),
    ],
)
def test_mistakes(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *flags])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {words}")


def test_a_failed_run_is_known_by_its_error(tmp_path: Path) -> None:
    made = Run(1, "step 1\nerror: no room on /x/runs.\nbye\n", tmp_path)
    assert made.last_line == "error: no room on /x/runs."
    assert several.named_as_the_reason(made, Path("/x/runs"))
    assert not several.named_as_the_reason(made, Path("/y"))
    assert not several.named_as_the_reason(Run(0, made.output, tmp_path), Path("/x/runs"))


def test_column_of_the_newest_run(tmp_path: Path) -> None:
    import os

    for version, value in enumerate(("1.0", "2.0")):
        file = tmp_path / f"version_{version}" / "metrics.csv"
        file.parent.mkdir()
        file.write_text(f"loss/total,other\n{value},\n,3\n")
        os.utime(file, (version, version))
    assert Run(0, "", tmp_path).column("loss/total") == [2.0]


def test_a_server_is_started_with_its_key_and_ended(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[SimpleNamespace] = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str], **_: object) -> None:
            seen.append(SimpleNamespace(command=command, env=env, ended=[]))

        def terminate(self) -> None:
            seen[-1].ended.append("asked")

        def kill(self) -> None:
            seen[-1].ended.append("killed")

        def wait(self, limit: float | None = None) -> None:
            if limit is not None:
                raise program.subprocess.TimeoutExpired("serve", limit)

    monkeypatch.setattr(program.subprocess, "Popen", Process)
    with pytest.raises(RuntimeError), program.served(bench, "x", "--teacher", env={"A": "b"}) as at:
        raise RuntimeError
    (one,) = seen
    assert one.command[3:6] == ["serve", "--model", bench.path("few-layers")]
    assert at.url.endswith(f":{one.command[one.command.index('--port') + 1]}")
    assert "--teacher" in one.command and one.env["VLLM_API_KEY"] == at.key
    assert one.env["A"] == "b" and one.ended == ["asked", "killed"]


def test_what_a_served_teacher_needs_is_named(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "placements", lambda _: iter(()))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert list(teacher.run(bench)) == [
        info("served teacher", "not reached: vLLM is not installed")
    ]
    monkeypatch.setattr(several, "fit", lambda *_, **__: Run(0, "", bench.folder))
    monkeypatch.setattr(several, "one_rank_fails", lambda _: iter(()))
    assert info("weights by NCCL", "not reached: they need two GPUs") in several.run(bench)
