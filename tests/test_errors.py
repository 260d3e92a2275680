"""The check of a number's bounds."""

from __future__ import annotations

import math

import pytest

from kdrl_lightning.errors import ConfigurationError, TrainingStopped, require_between


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


def test_a_configuration_error_is_a_value_error_and_a_stop_is_not():
    assert issubclass(ConfigurationError, ValueError)
    assert not issubclass(TrainingStopped, ValueError)
