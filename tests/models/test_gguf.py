"""GGUF files as model sources: found, refused in one line, converted once."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdrl_lightning import GGUFModel
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models import gguf

pytestmark = pytest.mark.usefixtures("cache_folder")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package without any file."""
    folder = tmp_path / "site" / "some_models"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(folder.parent))
    importlib.invalidate_caches()
    yield folder
    sys.modules.pop("some_models", None)


def refused(words: str, file: str | None = None, package: str | None = None) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        GGUFModel(file, package).path()
    assert "\n" not in str(caught.value)


def test_neither_file_nor_package_is_refused() -> None:
    refused(r"^`file` or `package` must be given: got neither\. Name a GGUF file or a package\.$")


def test_a_package_that_is_not_installed_names_the_cure() -> None:
    words = r"^`package` must be an installed package: got no_such. Install it: pip install no-such"
    refused(words, package="no_such")


def test_a_package_must_hold_one_file_or_be_told_which(package: Path) -> None:
    refused(r"`package` must hold one GGUF file: got 0 in some_models", package="some_models")
    for name in ("a.gguf", "b.gguf"):
        (package / name).write_bytes(b"")
    refused(
        r"`package` must hold one GGUF file: got 2 in some_m.+ with `file`", None, "some_models"
    )
    assert GGUFModel("b.gguf", "some_models").source() == package / "b.gguf"
    refused(
        r"`file` must be a GGUF file: got .+/some_models/c\.gguf, which", "c.gguf", "some_models"
    )
    (package / "a.gguf").unlink()
    assert GGUFModel(package="some_models").source() == package / "b.gguf"


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    refused(
        r"`file` must be a GGUF file: got .+/x\.gguf, which is not a file", str(tmp_path / "x.gguf")
    )


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no model at all, but long enough to be read"])
def test_a_file_that_is_broken_is_refused_and_leaves_nothing(
    tmp_path: Path, cache_folder: Path, content: bytes
) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    words = r"`file` must be a GGUF model that transformers can read: got .+/x\.gguf \(.+\)\."
    refused(words, str(tmp_path / "x.gguf"))
    assert [p for p in cache_folder.iterdir() if p.is_dir()] == []


@pytest.mark.parametrize("missing", [["gguf"], ["gguf", "accelerate"]])
def test_without_its_helpers_the_cure_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str]
) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name in missing else find(name)
    )
    found = " and no ".join(missing)
    refused(rf"got no {found}\. Install them: pip .+gguf\]'\.$", str(tmp_path / "x.gguf"))


def test_a_file_is_converted_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        made.append(file)
        (folder / "config.json").write_bytes(file.read_bytes())

    monkeypatch.setattr(gguf, "convert", convert)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"one")
    first = GGUFModel(str(file))
    folder = Path(first.path())
    assert folder.name.startswith("model-") and first.path() == GGUFModel(str(file)).path()
    assert made == [file]
    file.write_bytes(b"two")
    assert first.path() == str(folder)  # a run keeps the model that it began with
    second = Path(GGUFModel(str(file)).path())
    assert second != folder and (second / "config.json").read_bytes() == b"two"
