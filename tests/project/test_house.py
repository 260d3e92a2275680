"""The package's structure: allowed imports, sizes of folders, public and former names."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from kdrl_lightning.common.old_names import MOVED

PACKAGE = Path(__file__).parents[2] / "kdrl_lightning"
FILES = sorted(
    p
    for p in [*PACKAGE.rglob("*.py"), *(PACKAGE / "callbacks").rglob("*.py")]
    if "__pycache__" not in p.parts
)

# A room may import from itself and from the rooms named here.
FLOOR = {"common", "errors", "rollout_batch"}
# Room -> the rooms that it may import, the lowest first. What is not named here may import nothing.
ALLOWED = {
    "errors": set(),
    "common": {"errors"},
    "rollout_batch": {"common"},
    "losses": FLOOR,
    "objectives": FLOOR | {"losses"},
    "metrics": FLOOR | {"losses"},
    "models": FLOOR | {"losses"},
    "rewards": FLOOR,
    "prompts": FLOOR,
    "engines": FLOOR | {"models"},
    "teachers": FLOOR | {"engines", "losses", "models", "prompts", "rewards"},
    "checkpoints": FLOOR | {"models", "teachers", "trainer"},
    "rollout": FLOOR | {"engines", "metrics", "models", "objectives", "rewards", "teachers"},
    "evaluation": FLOOR | {"engines", "prompts", "rewards", "rollout"},
    "trainer": FLOOR | {"engines", "models", "objectives", "rewards", "rollout", "teachers"},
    "module": FLOOR
    | {"checkpoints", "evaluation", "losses", "metrics", "models", "objectives"}
    | {"teachers", "trainer"},
    "datamodule": FLOOR
    | {
        "engines",
        "evaluation",
        "models",
        "objectives",
        "prompts",
        "rewards",
        "rollout",
        "trainer",
    },
    "callbacks": FLOOR
    | {"checkpoints", "evaluation", "losses", "metrics", "models", "objectives"}
    | {"engines", "rollout", "teachers", "trainer"},
    "tiny": FLOOR
    | {"callbacks", "models", "module", "objectives", "prompts", "rewards", "datamodule"},
    "hardware": FLOOR
    | {"datamodule", "engines", "losses", "models", "module", "objectives", "rollout", "teachers"}
    | {"tiny", "trainer"},
    "cli": FLOOR
    | {"callbacks", "checkpoints", "datamodule", "engines", "evaluation", "models", "module"}
    | {"hardware", "objectives", "prompts", "rewards", "rollout", "trainer"},
    "__main__": {"cli", "common", "errors", "trainer"},
}
LIGHTNING = {
    "__main__",
    "callbacks",
    "checkpoints",
    "cli",
    "datamodule",
    "hardware",
    "module",
    "tiny",
    "trainer",
}
TRANSFORMERS = {"cli", "engines", "hardware", "models", "tiny"}
# A reader sees a folder at once, and so its files: at most so many modules, and entries in all.
MOST_MODULES = 12
MOST_ENTRIES = {"": 23}


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            out |= names if node.module == "kdrl_lightning" else {node.module}
    return out


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def arrows(path: Path) -> set[str]:
    """Other rooms that a file imports."""
    inside = {n.split(".")[1] for n in imports(path) if n.startswith("kdrl_lightning.")}
    return inside - {room(path), "__version__"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_down(path: Path) -> None:
    own = room(path)
    if own != "__init__":  # names every room, and imports one when it is asked
        assert arrows(path) <= ALLOWED[own]
    for name in imports(path):
        if name.split(".")[0] == "lightning":
            assert own in LIGHTNING, f"{own} imports Lightning"
        if name.split(".")[0] == "transformers":
            assert own in TRANSFORMERS, f"{own} imports transformers"
        assert name.split(".")[0] not in ("pytorch_lightning", "callbacks"), name
        if name.split(".")[0] == "peft":
            assert path.parent.name == "lora", "imports peft"
        if name.split(".")[0] == "vllm":
            assert path.parent.name == "vllm", "imports vLLM"


def test_every_room_has_its_arrows_and_no_circle() -> None:
    assert {room(p) for p in FILES} - {"__init__"} == set(ALLOWED)
    order = list(TopologicalSorter(ALLOWED).static_order())  # raises on a circle
    assert set(order) == set(ALLOWED)


def test_no_arrow_is_allowed_for_nothing() -> None:
    used: dict[str, set[str]] = {}
    for path in FILES:
        used.setdefault(room(path), set()).update(arrows(path))
    unused = {r: allowed - used[r] - FLOOR for r, allowed in ALLOWED.items()}
    assert not any(unused.values()), unused


@pytest.mark.parametrize("folder", sorted({p.parent for p in FILES}), ids=lambda p: p.name)
def test_a_folder_is_seen_at_a_glance(folder: Path) -> None:
    shown = [
        p for p in folder.iterdir() if p.name not in ("__pycache__", "__init__.py", "py.typed")
    ]
    assert sum(p.suffix == ".py" for p in shown) <= MOST_MODULES
    assert len(shown) <= MOST_ENTRIES.get(str(folder.relative_to(PACKAGE)).strip("."), 13)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_that_names_no_type_says_why(path: Path) -> None:
    text = path.read_text()
    nodes = ast.walk(ast.parse(text))
    lines = {node.lineno for node in nodes if isinstance(node, ast.Name) and node.id == "Any"}
    if path.name == "untyped.py":  # it has the reasons of the names that others use
        return
    said = "`Any`" in text or any("#" in text.splitlines()[line - 1] for line in lines)
    assert said == bool(lines), "a comment must give the reason, and only where `Any` is used"


def test_import_is_light() -> None:
    code = (
        "import sys, kdrl_lightning; "
        "print([m for m in ('vllm', 'transformers', 'lightning', 'torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_former_names_of_modules_lead_to_those_of_today() -> None:
    def exists(name: str) -> bool:
        path = PACKAGE / name.replace(".", "/")
        return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()

    assert {old for old in MOVED if exists(old)} == set()
    assert [new for new in MOVED.values() if not exists(new)] == []


@pytest.mark.parametrize("old", ["supervised", "rollout.partition", "callbacks.schedule"])
def test_a_former_name_works_with_a_warning(old: str) -> None:
    new = f"{PACKAGE.name}.{MOVED[old]}"
    words = rf"^`kdrl_lightning.{old}` must be imported as `{new}`: got the former name, which 0.3"
    sys.modules.pop(f"kdrl_lightning.{old}", None)
    with pytest.warns(FutureWarning, match=words):
        found = importlib.import_module(f"kdrl_lightning.{old}")
    today = vars(importlib.import_module(new))
    assert all(found.__dict__[name] is value for name, value in today.items() if name[0] != "_")


def test_public_names_exist() -> None:
    import kdrl_lightning

    for name in kdrl_lightning.__all__:
        assert getattr(kdrl_lightning, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = kdrl_lightning.Nothing


def test_callbacks_are_real_files_behind_one_link() -> None:
    link = PACKAGE / "callbacks"
    assert link.is_symlink(), "git must check out symbolic links (core.symlinks)"
    assert link.resolve() == PACKAGE.parent / "callbacks"
