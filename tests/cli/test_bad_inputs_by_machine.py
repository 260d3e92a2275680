"""Whatever is wrong in a configuration: one line, exit code 1 or 2, and nothing left behind.

``KDRL_BAD_INPUTS=1000 pytest tests/cli/test_bad_inputs_by_machine.py -s`` tries as many, and
prints how many of each kind there were; ``KDRL_BAD_INPUTS_SEED=1`` draws others.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from helpers.bad_inputs import CONFIGS, Case, cases, tree
from helpers.more_bad_inputs import more_cases
from kdrl_lightning.__main__ import main
from kdrl_lightning.cli.main import KDRLCLI

COUNT = int(os.environ.get("KDRL_BAD_INPUTS", "15"))
SEED = int(os.environ.get("KDRL_BAD_INPUTS_SEED", "0"))


class TrainedError(Exception):
    """A configuration with a mistake came as far as its first step."""


def complaint(case: Case, folder: Path, capsys: pytest.CaptureFixture[str]) -> str | None:
    """Run a case; return what is wrong with the answer."""
    for name, content in {**(case.files or {}), "config.yaml": case.text}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    given = sorted(folder.rglob("*"))
    capsys.readouterr()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main(["fit", "--config", "config.yaml", *case.flags])
        return "no error"
    except SystemExit as ended:
        code = ended.code
    except TrainedError:
        # A later file replaces the wrong value of a base: a note names it, and the run is right.
        noted = "note: " in capsys.readouterr().out and "base with" in case.what
        return None if noted else "it trained without a message"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    lines = capsys.readouterr().err.strip().splitlines()
    if code not in (1, 2):
        return f"exit code {code}"
    if len(lines) != 1 or not lines[0].startswith("error: ") or len(lines[0]) < 20:
        return f"{len(lines)} lines: {lines}"
    if "Union subtypes" in lines[0] or "Traceback" in lines[0] or len(lines[0]) > 1200:
        return f"no clear line: {lines[0]}"
    left = sorted(p.name for p in folder.rglob("*") if p not in given)
    return f"left behind: {left}" if left else None


@pytest.mark.parametrize("drawn", [cases, more_cases])
def test_every_mistake_is_one_line(
    drawn: Any,
    student_folder: str,
    teacher_folder: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def advance(*_: Any, **__: Any) -> None:
        raise TrainedError

    monkeypatch.setattr(_FitLoop, "advance", advance)
    # No case may start processes: they would be tests, too.
    monkeypatch.setattr(_SubprocessScriptLauncher, "launch", advance)
    # The parser of one subcommand is made in half the time of four.
    fit = {"fit": KDRLCLI.subcommands()["fit"]}
    monkeypatch.setattr(KDRLCLI, "subcommands", staticmethod(lambda: fit))
    configs = [(p.stem, tree(p, student_folder, teacher_folder)) for p in CONFIGS]
    seen: Counter[str] = Counter()
    wrong: list[str] = []

    @seed(SEED)
    @settings(
        max_examples=COUNT,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn(configs), st.none())
    def check(case: Case, _: None) -> None:
        with tempfile.TemporaryDirectory() as folder, monkeypatch.context() as patch:
            patch.chdir(folder)
            found = complaint(case, Path(folder), capsys)
        seen[case.kind] += 1
        if sum(seen.values()) % 50 == 0:
            with capsys.disabled():
                print(f"\n{dict(seen)}, {len(wrong)} badly answered", flush=True)
        if found is not None:
            wrong.append(f"{case.kind}: {case.what} {case.flags} -> {found}")
            with capsys.disabled():
                print(f"\n{wrong[-1]}", flush=True)

    check()
    with capsys.disabled():
        if COUNT > 100:
            print(f"\n{sum(seen.values())} mistakes, {len(wrong)} of them badly answered: {seen}")
    assert sum(seen.values()) >= COUNT
    assert not wrong, "\n".join(wrong)
