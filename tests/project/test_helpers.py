"""Code that tests share is in tests/helpers or in a conftest, once."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).parents[1]
TREES = {p: ast.parse(p.read_text()) for p in sorted(TESTS.rglob("*.py"))}


def test_no_test_imports_from_another() -> None:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            modules = [name.split(".")[-1] for name in names if name.split(".")[0] != "unittest"]
            assert not [m for m in modules if m.startswith("test_")], path


def test_no_function_is_written_twice() -> None:
    found = defaultdict(list)
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("test_"):
                said = isinstance(node.body[0], ast.Expr) and ast.get_docstring(node) is not None
                body = [ast.dump(line) for line in node.body[said:]]
                found[ast.dump(node.args), *body].append(f"{path.relative_to(TESTS)}:{node.name}")
    assert not [places for places in found.values() if len(places) > 1]
