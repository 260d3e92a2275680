"""`Any` needs a reason: a comment in its line, or one that names it for the whole file."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "kdrl_lightning"
# Python 3.13 follows the link to the callbacks only if it is asked to.
FILES = sorted(
    {p for p in PACKAGE.rglob("*.py") if "callbacks" not in p.parts}
    | set((PACKAGE / "callbacks").glob("*.py"))
)


def lines_without_a_reason(code: str) -> list[int]:
    """Return the numbers of the lines that use ``Any`` and for which no reason is given."""
    used, comments, texts = set(), {}, []
    importing = False
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        line = token.start[0]
        if token.type == tokenize.COMMENT:
            comments[line] = token.string
        elif token.type == tokenize.STRING and token.string.startswith(('"""', 'r"""')):
            texts.append(token.string)
        elif token.type == tokenize.NEWLINE:
            importing = False
        elif token.type == tokenize.NAME:
            importing |= token.string == "import"
            if token.string == "Any" and not importing:
                used.add(line)
    if any(re.search(r"`Any`", text) for text in [*comments.values(), *texts[:1]]):
        return []
    return sorted(used - set(comments))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_any_has_a_reason(path: Path) -> None:
    assert not lines_without_a_reason(path.read_text())


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("from typing import Any\nx: Any = 1\ny: dict[str, Any]  # as in yaml\n", [2]),
        ("from typing import (\n    Any,\n)\n\n\ndef f(\n    x: Any,\n) -> Any: ...\n", [7, 8]),
        ("# `Any`: peft has no types.\nx: Any = 1\n", []),
        ('"""A file.\n\nValues are ``Any``, as in yaml."""\nx: Any = 1\n', []),
        ('"""Any value."""\nx: int = 1  # Any\n', []),
    ],
)
def test_what_the_rule_sees(code: str, lines: list[int]) -> None:
    assert lines_without_a_reason(code) == lines
