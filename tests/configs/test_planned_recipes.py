"""The table of planned recipes agrees with the recipes; ``benchmarks/recipes.py`` updates it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import recipes
from benchmarks.recipes import FOLDER, MARGIN, OVERLAYS, cost, digest, gpu_hours, runs

ROOT = Path(__file__).parents[2]
ROWS: list[dict[str, Any]] = json.loads((ROOT / "docs/plan/recipes.json").read_text())
BY_NAME = {row["name"]: row for row in ROWS}
AGAIN = "run `python benchmarks/recipes.py --out docs/plan --only` with the names of what changed"


def test_every_recipe_and_overlay_is_in_the_table() -> None:
    assert [row["name"] for row in ROWS] == list(runs()), AGAIN
    planned = {name for name in runs() if (FOLDER / f"{name}.yaml").is_file()}
    parts = {"base", "teacher", "zebra", "countdown", "math"}  # no runs by themselves
    files = {str(p.relative_to(FOLDER).with_suffix("")) for p in FOLDER.rglob("*.yaml")}
    files = {
        name for name in files if not name.startswith("base/") and name.split("/")[-1] not in parts
    }
    assert planned == files


@pytest.mark.parametrize("name", list(runs()))
def test_a_planned_run_has_the_settings_of_its_files(name: str) -> None:
    assert BY_NAME[name]["digest"] == digest(runs()[name]), AGAIN
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", BY_NAME[name]["planned_on"])


def test_a_setting_that_a_plan_reads_changes_the_digest_and_a_logger_does_not(
    tmp_path: Path,
) -> None:
    file = tmp_path / "recipe.yaml"

    def of(more: str) -> str:
        file.write_text(f"base: {FOLDER / 'kdrl.yaml'}\n{more}")
        return digest([f"--config={file}"])

    plain = of("")
    assert plain == BY_NAME["kdrl"]["digest"]
    assert of("trainer: {logger: {init_args: {name: another}}}") == plain
    assert of("trainer: {accumulate_grad_batches: 32}") != plain
    assert of("model: {student: Qwen/Qwen3-4B}") != plain
    assert digest([f"--config={file}", "--model.chunk_size=8"]) != digest([f"--config={file}"])


def test_page_headers_and_costs_follow_from_the_record() -> None:
    assert (ROOT / "docs/plan/recipes.md").read_text() == recipes.page(ROWS), AGAIN
    readme = (FOLDER / "README.md").read_text()
    assert readme == recipes.with_costs(readme, ROWS), AGAIN
    for row in ROWS:
        file = FOLDER / f"{row['name']}.yaml"
        if file.is_file():
            assert file.read_text() == recipes.with_cost(file.read_text(), row), AGAIN
            assert f"| `{row['name']}` |" in readme and f"{cost(row)} |" in readme


def test_the_cost_is_seconds_times_rollouts_times_gpus() -> None:
    row = BY_NAME["kdrl"]
    assert (row["ranks"], row["rollouts"]) == (8, 200)
    hours = gpu_hours(row)
    assert hours == pytest.approx(row["seconds_per_rollout"] * 200 * 8 / 3600)
    assert f"200 rollouts: {hours:,.0f} GPU hours" in cost(row)
    assert gpu_hours(BY_NAME["smollm2_kdrl"]) is None


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_leaves_a_margin_on_the_card_that_it_names(name: str) -> None:
    row = BY_NAME[f"hardware/{name}"]
    assert row["fits"] and row["most_tokens"] >= row["micro_batch_tokens"]
    assert max(row["phases"].values()) <= (1 - MARGIN) * row["usable_bytes"]


def test_a_recipe_fits_its_cards_or_its_header_says_what_makes_it_fit() -> None:
    large = [row for row in ROWS if not row["fits"]]
    assert [row["name"] for row in large] == ["rlad_math_8b"]
    header = (FOLDER / "rlad_math_8b.yaml").read_text().split("base:")[0]
    assert large[0]["cures"]
    assert f"does not fit 80 GB without `{' '.join(large[0]['cures'])}`" in header
