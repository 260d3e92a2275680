"""The functions that check a setting's number, kind and bounds."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from kdrl_lightning import errors
from kdrl_lightning.errors import (
    ConfigurationError,
    TrainingStopped,
    require_between,
    require_count,
    require_kind,
)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, 0, 1, True])
def test_bounds_are_part_of_the_interval(value):
    require_between("x", value, 0.0, 1.0)


@pytest.mark.parametrize("value", [-1e-9, 1.0000001, math.nan, math.inf, -math.inf])
def test_values_outside_are_refused(value):
    with pytest.raises(ConfigurationError) as caught:
        require_between("x", value, 0.0, 1.0)
    assert str(caught.value) == f"`x` must be in [0, 1]: got {value}."


def test_the_cure_stands_at_the_end():
    with pytest.raises(ConfigurationError) as caught:
        require_between("x", 3, 0.5, 2.0, "Halve it.")
    assert str(caught.value) == "`x` must be in [0.5, 2]: got 3. Halve it."


@pytest.mark.parametrize("value", [0, -3, math.nan, math.inf])
def test_without_upper_bound_only_the_lower_is_named(value):
    with pytest.raises(ConfigurationError) as caught:
        require_between("x", value, 1, math.inf)
    assert str(caught.value) == f"`x` must be at least 1: got {value}."


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (1.5, "a whole number"),
        (2.0, "a whole number"),
        (0, "in [1, 8]"),
        (9, "in [1, 8]"),
        (math.nan, "in [1, 8]"),
        ("2", "a number"),
    ],
)
def test_a_count_is_a_whole_number(value, rule):
    with pytest.raises(ConfigurationError) as caught:
        require_count("x", value, 1, 8, "Round it.")
    assert str(caught.value) == f"`x` must be {rule}: got {value}. Round it."
    require_count("x", 8, 1, 8)


def test_no_bound_of_a_real_number_is_a_whole_number():
    """``require_between("n", n, 1, ...)`` would take 1.5: such a setting is a count."""
    package = Path(errors.__file__).parent
    files = [*package.rglob("*.py"), *(package / "callbacks").rglob("*.py")]
    counts = [
        (path.name, line.strip())
        for path in files
        if path.name != "errors.py"
        for line in path.read_text().splitlines()
        if re.search(r"require_between\([^,]+, [^,]+, \d+(?![\d.e])", line)
    ]
    assert len(files) > 100 and counts == []


def test_a_component_has_its_class():
    with pytest.raises(ConfigurationError) as caught:
        require_kind("x", "live", Path, "Give a path.")
    assert str(caught.value) == "`x` must be a Path: got 'live'. Give a path."
    require_kind("x", Path("a"), Path, "")


def test_a_configuration_error_is_a_value_error_and_a_stop_is_not():
    assert issubclass(ConfigurationError, ValueError)
    assert not issubclass(TrainingStopped, ValueError)
