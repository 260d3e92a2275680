"""The pages on methods agree with the code: settings, configurations, files."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kdrl_lightning import callbacks, objectives, rollout, teachers
from kdrl_lightning.cli.layered_yaml import load_with_base

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "methods"
INDEX = FOLDER / "README.md"
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TEXTS = sorted(
    [
        *ROOT.glob("*.md"),
        *(p for room in ("docs", "configs", "benchmarks") for p in (ROOT / room).rglob("*.md")),
    ]
)
# The pages are those that the index names.
PAGES = sorted(
    {FOLDER / m for m in re.findall(r"^\| \[[^]]+\]\((\w+\.md)\)", INDEX.read_text(), re.M)}
)
SETTINGS = re.compile(r"^## Settings of `(\w+)`\n(.*?)(?=^## |\Z)", re.M | re.S)


def tables(page: Path) -> dict[str, dict[str, str]]:
    """Return setting -> default for each class with a table on the page."""
    return {
        name: dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", text, re.M))
        for name, text in SETTINGS.findall(page.read_text())
    }


def defaults(name: str) -> dict[str, str]:
    """Return argument -> default of a class, as Python writes it."""
    owner = next(room for room in (objectives, callbacks, teachers) if hasattr(room, name))
    parameters = inspect.signature(getattr(owner, name)).parameters.values()
    return {p.name: repr(p.default) for p in parameters if p.default is not p.empty}


def contains(whole: Any, part: Any) -> bool:
    if isinstance(whole, dict) and isinstance(part, dict):
        return all(k in whole and contains(whole[k], v) for k, v in part.items())
    return bool(whole == part)


def loaded(path: Path) -> Any:
    return load_with_base(path.read_text(), str(path))


def test_where_things_are_names_files_and_what_is_in_them() -> None:
    """Every name in the last column of a row is defined in a file that the row links to."""
    page = ROOT / "docs/where.md"
    rows = re.findall(
        r"^\| (?!you want|---)([^|]+) \| ([^|]+) \| ([^|]+) \|$", page.read_text(), re.M
    )
    assert len(rows) > 12
    for task, links, there in rows:
        paths = [page.parent / path for path in re.findall(r"\]\((\.\./[^)#]+)\)", links)]
        assert 1 <= len(paths) <= 2, task
        assert all(path.is_file() for path in paths), task
        code = "\n".join(path.read_text() for path in paths)
        for name in re.findall(r"`(?:\w+\.)*(\w+)`", there):
            assert re.search(rf"(class|def) {name}\b", code), f"{task}: {name}"


def test_there_is_a_page_for_every_method() -> None:
    assert len(PAGES) == 29
    assert all(page.is_file() for page in PAGES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_has_a_page(path: Path) -> None:
    command = f"python -m kdrl_lightning fit --config configs/{path.name}\n"
    assert any(command in page.read_text() for page in PAGES)
    assert f"`configs/{path.name}`" in INDEX.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_page_has_its_sections(page: Path) -> None:
    text = page.read_text()
    assert re.match(r"# .+\n\n[^\n]+\n\n\*\*Source\*\*: ", text)
    heads = re.findall(r"^## (.+)$", text, re.M)
    assert heads[:2] == ["Formula", "When to use it"]
    assert heads[2:-2] and all(re.fullmatch(r"Settings( of `\w+`)?", h) for h in heads[2:-2])
    assert heads[-2:] == ["What goes wrong", "Tests"]
    assert text.count("$$") >= 2 and text.count("$$") % 2 == 0


@pytest.mark.parametrize("page", [*PAGES, INDEX], ids=lambda p: p.stem)
def test_settings_are_those_of_the_class(page: Path) -> None:
    found = tables(page)
    assert len(found) == page.read_text().count("## Settings of ")
    for name, settings in found.items():
        assert settings == defaults(name), name


def test_every_preset_has_its_table() -> None:
    there = {name for page in [*PAGES, INDEX] for name in tables(page)}
    presets = {n for n in objectives.__all__ if n.isupper()} | {"OnPolicyDistillation"}
    assert there >= presets | {"PolicyObjective", "Gates", "KLCoefficientAnnealing"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_yaml_is_that_of_a_configuration(page: Path) -> None:
    text = page.read_text()
    named = [loaded(ROOT / name) for name in re.findall(r"configs/\w+\.yaml", text)]
    shown = re.findall(r"^## Settings\n(.*?)(?=^## )", text, re.M | re.S)
    for block in (b for part in shown for b in re.findall(r"```yaml\n(.*?)```", part, re.S)):
        assert any(contains(config, yaml.safe_load(block)) for config in named), block


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_links_and_pictures_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"(?:tests|configs|benchmarks|docs)/[\w/.-]+\.(?:py|yaml|md|sh)", text):
        assert (ROOT / name).is_file(), name
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        heads = re.findall(r"^#+ (.+)$", linked.read_text(), re.M) if anchor else []
        anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in heads}
        assert not anchor or anchor in anchors, target


def test_the_readme_lists_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name})" in text, page.name


@pytest.mark.parametrize("name", ["VLLMEngine", "VLLMServerEngine"])
def test_settings_of_the_engines_are_those_of_the_class(name: str) -> None:
    text = (ROOT / "docs/vllm.md").read_text()
    part = re.search(rf"^## [^\n]*`{name}`\n(.*?)(?=^## )", text, re.M | re.S)
    assert part is not None
    shown = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", part[1], re.M))
    parameters = inspect.signature(getattr(rollout, name)).parameters.values()
    assert shown == {p.name: repr(p.default) for p in parameters if p.default is not p.empty}


@pytest.mark.parametrize("path", sorted((ROOT / "configs/engine").glob("*.yaml")), ids=str)
def test_an_engine_lies_over_any_method(path: Path) -> None:
    from kdrl_lightning.cli.main import KDRLCLI

    assert f"configs/engine/{path.name}" in (ROOT / "docs/vllm.md").read_text()
    config = loaded(path)
    teaches = "model" in config
    wanted = config["model"]["teacher"] if teaches else config["data"]["rollout_engine"]
    for method in ("rlad", "kdrl_mask_group"):
        flags = ["--config", str(ROOT / f"configs/{method}.yaml"), "--config", str(path)]
        if importlib.util.find_spec("vllm") is None and wanted["class_path"] == "VLLMEngine":
            with pytest.raises(ValueError, match="if vLLM is not installed"):
                KDRLCLI.run(flags, instantiate_only=True)
            continue
        cli = KDRLCLI.run(flags, instantiate_only=True)
        built = cli.model.teacher if teaches else cli.datamodule.rollout_engine
        assert type(built).__name__ == wanted["class_path"]
