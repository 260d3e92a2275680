"""A reward that runs the completion's program against unit tests in a sandbox."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from kdrl_lightning.common.untyped import Row
from kdrl_lightning.common.written_values import read_container
from kdrl_lightning.errors import ConfigurationError, require_between, require_count
from kdrl_lightning.rewards.base import BatchReward, Sample, Verdict
from kdrl_lightning.rewards.processes.sandbox import Sandbox, require_sandbox

BLOCK = re.compile(r"^```(?:python|py)[^\S\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE | re.I)

# Rows whose tests run once with an empty program before a run.
PROBED = 8


class CodeReward(BatchReward):
    """Give 1 if the completion's program passes all tests of its row, else 0.

    The program is the last closed Python code block (three backticks and ``python``). Tests are

    - assertions: a text or a list of texts (as in MBPP's ``test_list``), run after the program;
    - or ``{"inputs": [...], "outputs": [...]}`` (as in APPS and TACO): the program reads an input
      and prints an output. Outputs are compared line by line; white space at the ends of a line is
      ignored.

    A list or a dict that is written as text, as in a CSV file, is parsed.

    Programs run in bubblewrap with only the standard library: without network, files, other
    processes or environment variables, and with limits on time, memory and output. If bubblewrap
    does not work, no program runs. Assertions run in the same interpreter as the program, so a
    program can cheat them. Outputs are compared outside the sandbox, which a program cannot cheat.

    Args:
        tests_column: the row's column with the tests.
        time_limit_s: time limit of one run, in seconds.
        memory_mb: memory limit of one run, in MiB.
        output_kb: limit on the output of one run, in KiB.
        workers: number of programs that run at once.
    """

    def __init__(
        self,
        tests_column: str = "tests",
        time_limit_s: float = 5.0,
        memory_mb: int = 512,
        output_kb: int = 256,
        workers: int = 4,
    ) -> None:
        require_between("time_limit_s", time_limit_s, 0.1, 3600.0)
        require_count("memory_mb", memory_mb, 64, 1 << 20)
        require_count("output_kb", output_kb, 1, 1 << 20)
        require_count("workers", workers, 1, 1024)
        self.tests_column = tests_column
        self.workers = workers
        self._probed = 0
        self.sandbox = Sandbox(time_limit_s, memory_mb, output_kb)

    def judge(self, samples: Sequence[Sample]) -> list[float | Verdict | Exception]:
        """Judge several samples, ``workers`` at a time."""
        require_sandbox()
        with ThreadPoolExecutor(self.workers) as threads:
            return list(threads.map(self._attempt, samples))

    def answer(self, sample: Sample) -> str | None:
        """Return the completion's program; None if it has none."""
        return last_program(sample.text)

    def check(self, row: Row) -> None:
        """Check that tests can be read and, for the first rows, that an empty program fails them.

        Raises:
            KeyError: the row has no such column.
            ValueError: the tests are neither assertions nor inputs and outputs.
            ConfigurationError: an empty program passes them.
        """
        tests = row[self.tests_column]
        cases = read_tests(tests)
        self._probed += 1
        if self._probed <= PROBED and self._passes("", cases):
            raise ConfigurationError(
                f"a row's `{self.tests_column}` must fail for an empty program: got {tests!r:.99}, "
                "which tests nothing. Write assertions that run."
            )

    def start(self) -> None:
        """Check that the sandbox works.

        Raises:
            ConfigurationError: bubblewrap is not installed, or cannot create namespaces.
        """
        require_sandbox()

    def _attempt(self, sample: Sample) -> float | Exception:
        try:
            cases = read_tests(sample.row[self.tests_column])
            program = self.answer(sample)
            return float(program is not None and self._passes(program, cases))
        except Exception as error:
            return error

    def _passes(self, program: str, cases: str | list[tuple[str, str]]) -> bool:
        if isinstance(cases, str):
            return self.sandbox.run(f"{program}\n{cases}\n") is not None
        for given, wanted in cases:
            printed = self.sandbox.run(program, given)
            if printed is None or lines(printed) != lines(wanted):
                return False
        return True


def last_program(text: str) -> str | None:
    """Return the last Python code block of a text; None if it has none."""
    blocks = BLOCK.findall(text)
    return blocks[-1] if blocks else None


def read_tests(tests: object) -> str | list[tuple[str, str]]:
    """Return tests as one text of assertions, or as pairs of input and output.

    Raises:
        ValueError: the tests have neither form, or there are none.

    >>> read_tests('{"inputs": ["1 2"], "outputs": ["3"]}')
    [('1 2', '3')]
    """
    tests = tests.tolist() if hasattr(tests, "tolist") else tests  # numpy's, from Parquet
    if isinstance(tests, str):
        # As an assertion, a list or a dict as text would test nothing.
        tests = read_container(tests) or [tests]
    if isinstance(tests, Mapping) and {"inputs", "outputs"} <= set(tests):
        columns = [tests["inputs"], tests["outputs"]]
        columns = [(read_container(c) or ()) if isinstance(c, str) else c for c in columns]
        pairs = list(zip(*columns, strict=True))
        if pairs and all(isinstance(text, str) for pair in pairs for text in pair):
            return pairs
    elif isinstance(tests, list | tuple) and all(isinstance(test, str) for test in tests):
        joined = "\n".join(tests)
        if joined.strip() and _is_program(joined):
            return joined
    raise ValueError(f"tests must be assertions, or inputs and outputs: got {tests!r:.100}.")


def _is_program(text: str) -> bool:
    """Return whether Python can parse a text; otherwise, every program would fail these tests."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def lines(text: str) -> list[str]:
    """Split an output into stripped lines for the comparison."""
    return [line.strip() for line in text.strip().splitlines()]
