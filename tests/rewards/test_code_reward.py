"""Programs in the sandbox: what they may do, and what they may not."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rewards import CodeReward, RewardRunner, Sample
from kdrl_lightning.rewards.code import last_program
from kdrl_lightning.rewards.processes import sandbox
from kdrl_lightning.rewards.processes.sandbox import Sandbox, require_sandbox

try:
    require_sandbox()
    MISSING = ""
except ConfigurationError as error:
    MISSING = str(error)
needs_sandbox = pytest.mark.skipif(bool(MISSING), reason=MISSING)

ADD = "```python\ndef add(a, b):\n    return a + b\n```"
READ = "```python\nprint(sum(map(int, input().split())))\n```"
PAIRS = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]}


@needs_sandbox
@pytest.mark.parametrize(
    ("text", "tests", "expected"),
    [
        (ADD, ["assert add(1, 2) == 3", "assert add(0, 0) == 0"], 1.0),
        (ADD, "assert add(1, 2) == 4", 0.0),
        (f"{ADD}\nNo:\n```python\ndef add(a, b): return 0\n```", "assert add(1, 1)", 0.0),
        ("def add(a, b): return a + b", "assert add(1, 2) == 3", 0.0),
        ("```python\ndef add(a, b): return a + b", "assert add(1, 2) == 3", 0.0),
        ("", "assert True", 0.0),
        ("```python\ndef add(:\n```", "assert True", 0.0),
        ("```python\nimport sys; sys.exit(0)\n```", "assert False", 0.0),
        ("```python\nimport os; os._exit(0)\n```", "assert False", 0.0),
        ("```python\nraise SystemExit\n```", "assert False", 0.0),
        (READ, PAIRS, 1.0),
        (READ, json.dumps(PAIRS), 1.0),
        (ADD, '["assert add(1, 2) == 3", "assert add(0, 0) == 0"]', 1.0),
        (ADD, "['assert add(1, 2) == 3'\n 'assert add(0, 0) == 1']", 0.0),
        (READ, repr(PAIRS), 1.0),
        (READ, {name: repr(texts) for name, texts in PAIRS.items()}, 1.0),
        (READ, {"inputs": ["1 2", "3 4"], "outputs": ["3", "8"]}, 0.0),
        ("```python\nprint(3)\n```", PAIRS, 0.0),
        ("```python\nprint(' é\\nß ')\n```", {"inputs": [""], "outputs": ["é\nß"]}, 1.0),
    ],
)
def test_programs_are_judged_by_their_tests(text: str, tests: Any, expected: float) -> None:
    assert CodeReward()(Sample(text, [], {"tests": tests})) == expected


@needs_sandbox
@pytest.mark.parametrize(
    "tests",
    [
        '"assert add(1, 2) == 3"',  # a text in quotes
        "def check(add):\n    assert add(1, 2) == 3",  # nobody calls it
        {"inputs": ["1 2"], "outputs": [""]},
    ],
)
def test_tests_that_an_empty_program_passes_are_refused(tests: Any) -> None:
    words = r"^a row's `tests` must fail for an empty program: got .*which tests nothing\."
    with pytest.raises(ConfigurationError, match=words):
        RewardRunner(CodeReward()).check([{"tests": "assert add"}, {"tests": tests}])


@pytest.mark.parametrize(
    "tests",
    [
        "assert add(1, 2) = 3",  # fails for any program
        '{"inputs": ["1 2"], "outputs": ["3"]',
        {"inputs": "12", "outputs": "34"},  # no lists: one character each
        "{'inputs': ['1 2'], 'outputs': ['3', '4']}",
        '["", " "]',
    ],
)
def test_tests_that_no_program_could_pass_are_refused(tests: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^`reward` must be able to judge every row: got"):
        RewardRunner(CodeReward()).check([{"tests": tests}])


# Each tries what is forbidden, and prints "done" only if it succeeds.
FORBIDDEN = {
    "network": "import socket; socket.create_connection(('127.0.0.1', PORT), 1)",
    "any socket": "import socket; socket.socket()",
    "home": "open(HOME).read()",
    "the machine's files": "open('/etc/passwd').read()",
    "its processes": "import os; os.listdir('/proc')",
    "writing at the root": "open('/x', 'w')",
    "writing to a device folder": "open('/dev/shm/x', 'w')",
    "writing over itself": "open('/program.py', 'w')",
    "making a folder": "import os; os.mkdir('/dev/x')",
    "a file in memory": "import os; os.memfd_create('x')",
    "another process": "import os; os.fork()",
    "a shell": "import subprocess; subprocess.run(['/bin/sh', '-c', 'true'], check=True)",
    "a thread": "import threading; threading.Thread(target=int).start()",
    "a fork bomb": "import os\nwhile True: os.fork()",
    "much memory": "x = bytearray(1 << 30)",
    "much memory in pieces": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "more memory than the limit": (
        "import resource as r; r.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY,) * 2)"
    ),
    "much output": "while True: print('x' * 1000)",
    "many files": "x = [open('/program.py') for _ in range(100)]",
    "deep recursion": "def f(): f()\nf()",
    "a namespace": (
        "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0, 'no namespace'"
    ),
}


@needs_sandbox
@pytest.mark.parametrize("case", FORBIDDEN)
def test_what_is_forbidden_fails(case: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        code = FORBIDDEN[case].replace("HOME", repr(str(secret)))
        code = code.replace("PORT", str(server.getsockname()[1]))
        assert Sandbox(seconds=10.0, memory_mb=256).run(code) is None
    # Without the sandbox most of it would have worked: the same limits let an honest program be.
    assert Sandbox(seconds=10.0, memory_mb=256).run("print('done')") == "done\n"


@needs_sandbox
@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(1000)"])
def test_an_endless_program_is_ended_with_all_that_it_is(code: str) -> None:
    mark = f"# {os.urandom(8).hex()}"
    assert Sandbox(seconds=0.5).run(f"{code} {mark}") is None
    until = time.monotonic() + 10
    while time.monotonic() < until:
        found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        if "/program.py" not in found:
            break
        time.sleep(0.1)
    assert "/program.py" not in found


@needs_sandbox
def test_the_environment_and_the_arguments_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    out = Sandbox().run("import os, sys; print(sorted(os.environ), sys.argv)")
    assert out == "['LC_CTYPE', 'PWD'] ['program.py']\n"


@needs_sandbox
def test_a_program_that_fails_to_be_tested_is_a_failure_of_the_reward() -> None:
    rows: list[dict[str, Any]] = [{}, {"tests": None}, {"tests": []}, {"tests": "{"}, {"tests": 5}]
    results = CodeReward().judge([Sample(ADD, [], row) for row in rows])
    assert all(isinstance(result, Exception) for result in results)
    assert "tests must be assertions, or inputs and outputs: got None" in str(results[1])


def test_the_last_closed_block_is_the_program() -> None:
    assert last_program("```python\n1\n```\n```py\n2\n```\n```\n3\n```\n```python\n4\n") == "2\n"
    assert last_program("```Python \nx = '```'\n```") == "x = '```'\n"
    assert last_program("`" * 100_000) is None


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the sandbox be looked for again, and never be used."""
    for cached in (sandbox.require_sandbox, sandbox._bubblewrap):
        cached.cache_clear()
    yield monkeypatch
    for cached in (sandbox.require_sandbox, sandbox._bubblewrap):
        cached.cache_clear()


def test_without_bubblewrap_nothing_is_run(elsewhere: pytest.MonkeyPatch) -> None:
    elsewhere.setattr(sandbox, "which", lambda name: None)
    elsewhere.setattr(subprocess, "Popen", None)
    words = r"^`bwrap` must be installed to run code: got none\. Run `apt-get install bubblewrap`"
    reward = CodeReward()
    for run in (reward.start, lambda: reward(Sample(ADD, [], {"tests": "assert add(1, 1)"}))):
        with pytest.raises(ConfigurationError, match=words):
            run()
    with pytest.raises(ConfigurationError, match=words):
        RewardRunner(reward).try_once({"prompt": "", "tests": "assert True"})


def test_where_bubblewrap_cannot_make_a_sandbox_nothing_is_run(
    elsewhere: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create' >&2\nexit 1\n")
    broken.chmod(0o755)
    elsewhere.setattr(sandbox, "which", lambda name: str(broken))
    words = r"^`bwrap` must be able to create a sandbox: got bwrap: No permissions to.* Run"
    with pytest.raises(ConfigurationError, match=words) as caught:
        CodeReward().judge([Sample(ADD, [], {"tests": "assert True"})])
    assert "\n" not in str(caught.value)


def test_on_another_machine_nothing_is_run(elsewhere: pytest.MonkeyPatch) -> None:
    elsewhere.setattr(sandbox, "which", lambda name: "/usr/bin/bwrap")
    elsewhere.setattr(sandbox.platform, "machine", lambda: "abacus")
    with pytest.raises(ConfigurationError, match=r"must run on one of x86_64, aarch64: got abacus"):
        CodeReward().start()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"time_limit_s": 0.0}, "`time_limit_s` must be in"),
        ({"memory_mb": 1}, "`memory_mb` must be in"),
        ({"output_kb": 0}, "`output_kb` must be in"),
        ({"workers": 0}, "`workers` must be in"),
    ],
)
def test_limits_that_cannot_be_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        CodeReward(**arguments)
