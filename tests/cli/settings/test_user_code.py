"""Importing a user's module or building its class leaves torch's defaults as they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kdrl_lightning.cli.settings.unused import take_notes
from kdrl_lightning.cli.settings.user_code import build, import_object

MODULE = """
import torch
torch.set_default_dtype(torch.float64)
class Odd:
    def __init__(self, fails=False):
        torch.set_grad_enabled(False)
        if fails:
            raise ValueError("no")
"""


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    take_notes()
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)


def test_what_they_change_of_torch_is_undone_and_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    odd = import_object("odd_module.Odd")
    assert torch.get_default_dtype() == torch.float32
    build(odd)
    assert torch.is_grad_enabled()
    cure = "which the run depends on: it is restored. Change it only where it is needed."
    assert take_notes() == [
        "odd_module.Odd changed torch's default dtype from torch.float32 to torch.float64, " + cure,
        "Odd changed torch's gradient mode from True to False, " + cure,
    ]
    with pytest.raises(Exception, match="must be possible to build"):
        build(odd, fails=True)
    assert torch.is_grad_enabled()
