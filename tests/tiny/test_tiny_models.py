"""Names and refusals of the embedded models; nothing is trained here."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models import load_causal_lm
from kdrl_lightning.tiny import models
from kdrl_lightning.tiny.models import TinyModel, save_untrained


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"role": "parent"}, r"^`role` must be teacher or student: got parent\.$"),
        ({"role": "student", "slip": 1.5}, r"^`slip` must be in \[0, 1\]: got 1\.5\.$"),
        ({"role": "student", "slip": math.nan}, r"^`slip` must be in \[0, 1\]: got nan\.$"),
        ({"role": "teacher", "digits": 0}, r"^`digits` must be in \[1, 9\]: got 0\.$"),
        ({"role": "teacher", "digits": 10}, r"^`digits` must be in \[1, 9\]: got 10\.$"),
        ({"role": "teacher", "seed": -1}, r"^`seed` must be at least 0: got -1\.$"),
    ],
)
def test_bad_values_are_refused(arguments, words):
    with pytest.raises(ConfigurationError, match=words):
        TinyModel(**arguments)


def test_whatever_the_weights_depend_on_changes_the_name():
    variants = [
        TinyModel("student"),
        TinyModel("teacher"),
        TinyModel("student", slip=0.5),
        TinyModel("student", slip=0.9000001),
        TinyModel("student", digits=5),
        TinyModel("student", seed=1),
    ]
    assert len({model.name for model in variants}) == len(variants)


def test_the_recipe_changes_the_name(monkeypatch):
    before = TinyModel("student").name
    changed = replace(models.RECIPES["student"], steps=7)
    monkeypatch.setitem(models.RECIPES, "student", changed)
    assert TinyModel("student").name != before


def test_slip_is_nothing_to_the_teacher():
    assert TinyModel("teacher", slip=0.3).name == TinyModel("teacher").name
    assert TinyModel("teacher", slip=0.3).slip == 0.0


def test_the_same_arguments_have_the_same_name():
    assert TinyModel("student").name == TinyModel("student", 0.9, 4, 0).name


def test_path_is_the_cached_folder_and_made_once(monkeypatch, tmp_path):
    monkeypatch.setenv("KDRL_LIGHTNING_CACHE", str(tmp_path))
    calls = []

    def make(self, folder):
        calls.append(self.name)
        (folder / "model").write_text(self.name)

    monkeypatch.setattr(TinyModel, "_make", make)
    source = TinyModel("student")
    assert source.path() == source.path() == str(tmp_path / source.name)
    assert calls == [source.name]


def test_untrained_weights_follow_the_seed(tmp_path):
    recipe = replace(models.RECIPES["student"], width=32, layers=1)
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_untrained(recipe, tmp_path / name, seed)
        weights.append(load_causal_lm(str(tmp_path / name)).lm_head.weight)
    assert weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])
