"""The embedded models: names, refusals, the shipped pair; equal seeds give equal bits."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.tiny import models
from kdrl_lightning.tiny.models import Recipe, TinyModel, save_untrained


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"role": "parent"},
            r"^`role` must be one of teacher, merging_teacher, student, reader: got parent\.",
        ),
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
        TinyModel("student", slip=math.nextafter(0.9, 1.0)),
        TinyModel("student", digits=5),
        TinyModel("student", seed=1),
        TinyModel("reader"),
        TinyModel("reader", slip=0.5),
    ]
    assert len({model.name for model in variants}) == len(variants)


@pytest.mark.parametrize(
    ("slip", "written"), [(0.9, "0.9"), (1, "1.0"), (0.1 + 0.2, "0.30000000000000004")]
)
def test_the_name_has_the_slip_in_full(slip, written):
    name = TinyModel("student", slip=slip, digits=3, seed=5).name
    assert name.startswith(f"addition3-student-slip{written}-seed5-")


def test_a_recipe_takes_32_additions_per_step_unless_said_otherwise():
    assert Recipe(width=32, layers=1, steps=1, lr=1e-3, muon=False).batch_size == 32
    assert models.RECIPES["teacher"].batch_size == 32


def test_what_a_reader_is_shown_changes_its_name_and_no_other(monkeypatch):
    reader, student = TinyModel("reader").name, TinyModel("student").recipe_name
    monkeypatch.setitem(models.RECIPES, "reader", replace(models.RECIPES["reader"], shown=0.25))
    assert TinyModel("reader").name != reader
    assert student == "addition4-student-slip0.9-seed0-abc1589c"


@pytest.mark.parametrize(
    "change", [{"steps": 7}, {"batch_size": 7}, {"lr": 7e-3}, {"muon": False}, {"width": 64}]
)
def test_the_recipe_changes_the_name(monkeypatch, change):
    before = TinyModel("student").name
    changed = replace(models.RECIPES["student"], **change)
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


def test_the_shipped_pair_is_unpacked_and_a_changed_file_is_refused(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    import kdrl_lightning.tiny.models as models

    monkeypatch.setenv("KDRL_LIGHTNING_CACHE", str(tmp_path / "cache"))
    for role in ("teacher", "reader", "student"):
        model = TinyModel(role)
        file = models.SHIPPED / f"{model.recipe_name}.safetensors"
        assert file.stat().st_size < 1_500_000
        made = load_file(Path(model.path()) / "model.safetensors")
        for name, tensor in load_file(file).items():
            assert torch.equal(made[name], tensor.float()), name
    broken = tmp_path / file.name
    weights = load_file(file)
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, broken)
    with pytest.raises(ConfigurationError, match="must have the checksum 4718"):
        models.unpack(broken, models.RECIPES["student"], tmp_path / "folder")


def test_the_reader_is_its_own_teacher(tmp_path, monkeypatch):
    """After the worked answer it writes it; after the question alone it forgets carries."""
    from kdrl_lightning.models.loading import load_tokenizer
    from kdrl_lightning.tiny.addition import READING, ColumnAddition

    monkeypatch.setenv("KDRL_LIGHTNING_CACHE", str(tmp_path))
    path = TinyModel("reader").path()
    model, tokenizer = load_causal_lm(path), load_tokenizer(path)
    rows = list(ColumnAddition(100, seed=2, solutions=True))
    seen = [
        READING.replace("{context}", r["solution"]).replace("{prompt}", r["prompt"]) for r in rows
    ]

    def right(prompts):
        ids = torch.tensor([tokenizer(prompt)["input_ids"] for prompt in prompts])
        out = model.generate(ids, do_sample=False, max_new_tokens=18, pad_token_id=0)
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        return sum(text == row["solution"] for text, row in zip(texts, rows, strict=True))

    assert right([row["prompt"] for row in rows]) < 35
    assert right(seen) > 95


def test_a_pair_of_one_seed_is_the_same_to_the_bit(tmp_path, monkeypatch):
    import kdrl_lightning.tiny.models as models

    small = Recipe(width=32, layers=1, steps=10, lr=1e-3, muon=True, batch_size=4)
    monkeypatch.setitem(models.RECIPES, "student", small)
    sums = []
    for name in ("one", "two"):
        TinyModel("student").train(tmp_path / name)
        sums.append(models.pack(tmp_path / name, tmp_path / "packed" / f"{name}.safetensors"))
    assert sums[0] == sums[1]
