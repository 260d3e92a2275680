"""Classes that an engine patches are restored for the student, and stay patched for the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdrl_lightning.engines.vllm.transformers_classes import classes_kept


class Wrapper:
    def extra(self) -> str:
        return "of the engine"


class Decoder(nn.Module):
    scale = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.linear(x)


class Inside(Decoder):
    """Inherits what changes."""


def decorate() -> None:
    """As ``support_torch_compile`` does."""
    start = Decoder.__init__

    def make(self: Any) -> None:
        start(self)
        self.compiled = False

    def call(self: Any, x: Tensor) -> Tensor:
        return self.forward(x) if not self.compiled else x

    Decoder.__bases__ = (*Decoder.__bases__, Wrapper)
    Decoder.__init__ = make  # type: ignore[method-assign]
    Decoder.__call__ = call  # type: ignore[method-assign]
    Decoder.added = 1  # type: ignore[attr-defined]
    Decoder.scale = 3.0


@pytest.mark.parametrize("kind", [Decoder, Inside])
def test_the_student_is_as_before_and_the_engine_as_it_was_made(kind: type[Decoder]) -> None:
    student, x = kind(), torch.ones(1, 2)
    before, attributes = student(x), {**vars(Decoder)}
    with classes_kept() as keep:
        decorate()
        theirs = kind()
        theirs.load_state_dict(student.state_dict())
        with pytest.raises(AttributeError, match="compiled"):
            student(x)  # as the student's next forward pass would be
        keep(nn.ModuleList([theirs]))
    assert torch.equal(student(x), before)
    assert Decoder.__bases__ == (nn.Module,) and dict(vars(Decoder)) == attributes
    assert torch.equal(kind()(x).isnan(), torch.zeros(1, 2, dtype=torch.bool))
    changed: Any = theirs
    assert torch.equal(changed(x), 1.5 * before)
    assert changed.extra() == "of the engine" and changed.added == 1
    assert isinstance(changed, kind) and type(changed) is not kind
    assert type(changed).__name__ == kind.__name__


def test_what_an_engine_removes_comes_back() -> None:
    with classes_kept():
        del Decoder.scale
    assert Decoder.scale == 2.0


def test_an_engine_that_fails_to_start_leaves_the_classes_alone() -> None:
    student, x = Decoder(), torch.ones(1, 2)
    before = student(x)
    with pytest.raises(RuntimeError, match="no memory"), classes_kept():
        decorate()
        raise RuntimeError("no memory")
    assert torch.equal(student(x), before)


def test_configurations_keep_their_type() -> None:
    from transformers import Qwen2Config

    with classes_kept():
        Qwen2Config.model_type = "another"
    assert Qwen2Config.model_type == "qwen2"
