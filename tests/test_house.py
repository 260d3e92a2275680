"""The arrows of the house: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kdrl_lightning"
FILES = sorted(
    p
    for p in [*PACKAGE.rglob("*.py"), *(PACKAGE / "callbacks").glob("*.py")]
    if "__pycache__" not in p.parts
)

# A room may import from itself and from the rooms named here.
FLOOR = {"errors", "optional", "rollout_batch"}
ALLOWED = {
    "errors": set(),
    "optional": {"errors"},
    "rollout_batch": set(),
    "losses": FLOOR,
    "advantages": FLOOR,
    "objectives": FLOOR | {"losses", "advantages"},
    "models": FLOOR | {"architectures"},
    "cache": {"errors"},
    "gguf": {"cache", "errors", "models"},
    "lora": FLOOR | {"architectures"},
    "weights": FLOOR | {"lora", "models"},
    "compatibility": {"errors"},
    "end_tokens": {"architectures", "errors", "models"},
    "merging": set(),
    "caches": {"merging"},
    "architectures": {"errors"},
    "scorer": FLOOR | {"architectures", "caches", "losses", "merging"},
    "server_client": {"errors"},
    "shard_loading": set(),
    "sharding": FLOOR | {"architectures", "lora", "models", "scorer", "shard_loading"},
    "strategies": {"errors", "shard_loading", "sharding"},
    "teachers": FLOOR
    | {"compatibility", "end_tokens", "lora", "losses", "models", "scorer"}
    | {"server_client", "sharding", "weights"},
    "rewards": FLOOR,
    "prompts": FLOOR,
    "metrics": FLOOR,
    "rollout": FLOOR
    | {"architectures", "caches", "end_tokens", "losses", "metrics", "models", "rewards"}
    | {"server_client", "weights"},
    "nonfinite": {"errors"},
    "pending": FLOOR | {"losses"},
    "evaluation": FLOOR | {"metrics", "prompts", "rewards", "rollout"},
    "samples": FLOOR | {"objectives", "rollout"},
    "resume": FLOOR | {"models"},
    "integrity": set(),
    "checkpoints": FLOOR | {"integrity", "rollout"},
    "export": FLOOR | {"checkpoints", "integrity", "lora", "models", "resume", "weights"},
    "module": FLOOR
    | {"checkpoints", "compatibility", "end_tokens", "evaluation", "integrity", "lora", "losses"}
    | {"metrics", "models"}
    | {"nonfinite", "objectives", "pending", "resume"}
    | {"scorer", "sharding", "strategies", "teachers", "weights"},
    "checks": FLOOR | {"datamodule", "objectives", "rewards", "rollout"},
    "datamodule": FLOOR
    | {"checks", "end_tokens", "evaluation", "prompts", "rewards", "rollout", "weights"},
    "supervised": FLOOR | {"end_tokens", "prompts", "rollout"},
    "plots": {"metrics"},
    "schedules": {"errors"},
    "serve": {"errors", "rollout"},
    "callbacks": FLOOR
    | {
        "checkpoints",
        "evaluation",
        "lora",
        "losses",
        "metrics",
        "models",
        "objectives",
        "plots",
        "rollout",
        "samples",
        "schedules",
    },
    "tiny": FLOOR
    | {"cache", "callbacks", "models", "module", "objectives", "prompts", "rewards"}
    | {"supervised"},
}
LIGHTNING = {
    "strategies",
    "__main__",
    "module",
    "datamodule",
    "checkpoints",
    "checks",
    "supervised",
    "callbacks",
    "tiny",
    "cli",
    "evaluate",
    "parser",
}
TRANSFORMERS = {"architectures", "models", "caches", "gguf", "tiny", "rollout", "cli"}


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    out = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            out.add(node.module)
    return out


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_down(path: Path) -> None:
    own = room(path)
    for name in imports(path):
        if name.startswith("kdrl_lightning.") and own in ALLOWED:
            target = name.split(".")[1]
            assert target == own or target in ALLOWED[own], f"{own} imports {target}"
        if name.split(".")[0] == "lightning":
            assert own in LIGHTNING, f"{own} imports Lightning"
        if name.split(".")[0] == "transformers":
            assert own in TRANSFORMERS, f"{own} imports transformers"
        assert name.split(".")[0] not in ("pytorch_lightning", "callbacks"), name
        if name.split(".")[0] == "peft":
            assert own == "lora", "imports peft"
        if name.split(".")[0] == "vllm":
            assert path.name in ("vllm_engine.py", "vllm_transfer.py"), "imports vLLM"


def test_every_room_has_its_arrows() -> None:
    outside = {"__init__", "__main__", "cli", "config_base", "evaluate", "parser", "settings"}
    assert {room(p) for p in FILES} - outside == set(ALLOWED)


def test_import_is_light() -> None:
    code = (
        "import sys, kdrl_lightning; "
        "print([m for m in ('vllm', 'transformers', 'lightning', 'torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


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
