"""Histograms with fixed edges: counts, quantiles, and what reaches loggers and the picture."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.reference import f64, normal
from kdrl_lightning.callbacks.reports.loggers import log_histograms
from kdrl_lightning.callbacks.reports.plots import plot_imitation
from kdrl_lightning.callbacks.reports.summary import imitation_table
from kdrl_lightning.metrics import Histogram, Histograms

RANGES = {"a": (0.0, 4.0), "b": (-1.0, 1.0)}


def everywhere(values: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(values, dtype=torch.bool)


def test_values_are_counted_between_their_edges() -> None:
    histograms = Histograms(RANGES, bins=4)
    values = torch.tensor([0.5, 1.5, 1.6, 2.0, 3.99])
    histograms.add("a", values, everywhere(values))
    (histogram,) = histograms.compute(None).values()
    assert histogram.counts.tolist() == [1, 2, 1, 1]
    assert histogram.edges.tolist() == [0, 1, 2, 3, 4]
    assert (histogram.low, histogram.high) == (0.0, 4.0)


def test_the_outer_bins_take_what_lies_beyond() -> None:
    histograms = Histograms(RANGES, bins=4)
    values = torch.tensor([-100.0, -math.inf, 100.0, math.inf, 4.0])
    histograms.add("a", values, everywhere(values))
    assert histograms.compute(None)["a"].counts.tolist() == [2, 0, 0, 3]


def test_masked_values_do_not_count() -> None:
    histograms = Histograms(RANGES, bins=2)
    values = torch.tensor([[0.5, math.nan], [3.0, math.inf]])
    histograms.add("a", values, torch.tensor([[True, False], [True, False]]))
    histograms.add("b", values, torch.zeros(2, 2, dtype=torch.bool))
    got = histograms.compute(None)
    assert got["a"].counts.tolist() == [1, 1]
    assert got["b"].counts.tolist() == [0, 0]


def test_parts_add_up_and_are_forgotten() -> None:
    values, parts = normal(64, seed=0).float(), Histograms(RANGES, bins=10)
    whole = Histograms(RANGES, bins=10)
    whole.add("b", values, everywhere(values))
    for part in values.split(7):
        parts.add("b", part, everywhere(part))
    assert torch.equal(parts.compute(None)["b"].counts, whole.compute(None)["b"].counts)
    assert parts.compute(None) == {}


def test_counts_are_summed_over_ranks_in_one_call() -> None:
    calls: list[str] = []

    def reduce(value: torch.Tensor, operation: str) -> torch.Tensor:
        calls.append(operation)
        return 2 * value

    histograms = Histograms(RANGES, bins=2)
    for name in RANGES:
        histograms.add(name, torch.tensor([0.5, -0.5]), torch.tensor([True, True]))
    got = histograms.compute(reduce)
    assert calls == ["sum"]
    assert got["a"].counts.tolist() == [4, 0] and got["b"].counts.tolist() == [2, 2]


@given(st.lists(st.floats(-0.99, 0.99), min_size=1, max_size=40), st.floats(0.01, 1.0))
def test_a_quantile_is_right_to_the_width_of_a_bin(values: list[float], share: float) -> None:
    histograms, width = Histograms(RANGES, bins=400), 2 / 400
    histograms.add("b", f64(values), everywhere(f64(values)))
    got = histograms.compute(None)["b"].quantile(share)
    rank = next(i for i in range(len(values)) if i + 1 >= share * len(values) - 1e-9)
    exact = sorted(values)[rank]
    assert exact - 1e-6 <= got <= exact + width + 1e-6


def test_quantiles_by_hand() -> None:
    histogram = Histogram(torch.tensor([1.0, 2.0, 0.0, 1.0]), 0.0, 8.0)
    assert [histogram.quantile(q) for q in (0.25, 0.26, 0.75, 0.76, 1.0)] == [2, 4, 4, 8, 8]
    assert math.isnan(Histogram(torch.zeros(4), 0.0, 8.0).quantile(0.5))


class Writer:
    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def add_histogram_raw(self, name: str, **values: Any) -> None:
        self.seen.append({"name": name, **values})


def test_tensorboard_gets_the_counts() -> None:
    writer = Writer()
    loggers = [SimpleNamespace(experiment=writer), SimpleNamespace(experiment=object())]
    histogram = Histogram(f64([1, 0, 3, 0]), -2.0, 2.0)
    log_histograms(loggers, {"hist/entropy": histogram}, 7)
    (seen,) = writer.seen
    assert (seen["name"], seen["global_step"], seen["num"]) == ("hist/entropy", 7, 4)
    assert (seen["min"], seen["max"]) == (-2.0, 2.0)
    assert seen["bucket_limits"] == [-1.0, 0.0, 1.0, 2.0]
    assert seen["bucket_counts"] == [1.0, 0.0, 3.0, 0.0]
    assert (seen["sum"], seen["sum_squares"]) == (-1.5 + 3 * 0.5, 2.25 + 3 * 0.25)


def test_tensorboard_itself_takes_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path)
    histogram = Histogram(f64([1, 0, 3, 0]), -2.0, 2.0)
    log_histograms([logger], {"hist/entropy": histogram}, 1)
    logger.experiment.close()
    (file,) = Path(logger.log_dir).glob("events.*")
    assert b"hist/entropy" in file.read_bytes()


def test_the_table_shows_the_first_and_the_last_rollouts() -> None:
    rows = [{"rollout": float(r), "kd/a": float(r)} for r in range(1, 11)]
    rows[9]["kd/only_late"] = 5.0
    head, first, second = imitation_table(rows, 3).strip().splitlines()
    assert head.split()[-4:] == ["first", "3", "last", "3"]
    assert first.split() == ["kd/a", "2.000", "9.000"]
    assert second.split() == ["kd/only_late", "-", "5.000"]
    assert "rollout " not in first + second
    line = imitation_table(rows[:2], 5).strip().splitlines()[1]
    assert line.split() == ["kd/a", "1.500", "1.500"]


@pytest.mark.parametrize("full", [True, False])
def test_the_picture_is_drawn(tmp_path: Path, full: bool) -> None:
    from PIL import Image

    rows: list[dict[str, float]] = [{"rollout": 1.0}, {"rollout": 2.0}]
    shown: dict[int, dict[str, Histogram]] = {}
    if full:
        rows = [
            {"rollout": float(r), "kd/imitation_frac": 0.5, "kd/conflict_frac": 0.1} for r in (1, 2)
        ]
        shown = {
            1: {"hist/teacher_gap": Histogram(f64(range(500)), -10.0, 10.0)},
            11: {"hist/teacher_gap": Histogram(torch.zeros(500), -10.0, 10.0)},
        }
    plot_imitation(tmp_path / "imitation.png", rows, shown)
    with Image.open(tmp_path / "imitation.png") as picture:
        assert picture.size == (1430, 704)
        colours = len(picture.convert("RGB").getcolors(1 << 20) or [])
    assert colours > (100 if full else 10)
