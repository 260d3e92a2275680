"""The weights of a self-teacher that are not the current student's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from kdrl_lightning.models.lora import adapters_off, is_adapter
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import local


class OtherWeights(Protocol):
    """Weights other than the current student's, with which a self-teacher scores."""

    @property
    def module(self) -> nn.Module | None:
        """What a checkpoint must hold if the weights follow the student; None if nothing."""

    def scorer(self) -> AbstractContextManager[Scorer]:
        """Return a context that gives a scorer with these weights."""

    def follow(self, student_share: float) -> None:
        """Move the weights towards the student's: ``kept <- (1 - a) kept + a student``."""


class BaseModel:
    """A LoRA student's base model: the adapters are switched off. It takes no extra memory."""

    module: nn.Module | None = None

    def __init__(self, student: Scorer) -> None:
        self._student = student

    @contextmanager
    def scorer(self) -> Iterator[Scorer]:
        """Switch the adapters off inside the context."""
        with adapters_off(self._student.model):
            yield self._student

    def follow(self, student_share: float) -> None:
        """Do nothing: the base model is frozen."""


class SecondModel:
    """A second model of the student's architecture, sharded as the student is.

    Args:
        student: the student.
        second: the scorer of the second model, which is frozen.
    """

    def __init__(self, student: Scorer, second: Scorer) -> None:
        self._student, self._second = student, second

    @property
    def module(self) -> nn.Module:
        """The second model."""
        return self._second

    def scorer(self) -> AbstractContextManager[Scorer]:
        """Return a context that gives the second model."""
        return nullcontext(self._second)

    def follow(self, student_share: float) -> None:
        """Move all weights towards the student's."""
        blend(self._second.parameters(), self._student.parameters(), student_share)


class SecondAdapters:
    """Second adapters of a LoRA student, which replace its adapters while the teacher scores."""

    def __init__(self, student: Scorer) -> None:
        self._student = student
        named = student.model.named_parameters()
        # A parameter's name must not contain dots.
        ours = {name.replace(".", "/"): p for name, p in named if is_adapter(name)}
        self.module = nn.ParameterDict(
            {n: nn.Parameter(p.detach().clone(), requires_grad=False) for n, p in ours.items()}
        )
        self._ours = [ours[name] for name in self.module]  # a `ParameterDict` sorts its names

    @contextmanager
    def scorer(self) -> Iterator[Scorer]:
        """Write the second adapters into the student, and restore its adapters afterwards."""
        students = [local(p).detach().clone() for p in self._ours]
        blend(self._ours, self.module.values(), 1.0)
        try:
            yield self._student
        finally:
            blend(self._ours, students, 1.0)

    def follow(self, student_share: float) -> None:
        """Move both factors of each adapter towards the student's."""
        blend(self.module.values(), self._ours, student_share)


@torch.no_grad()
def blend(kept: Iterable[Tensor], student: Iterable[Tensor], student_share: float) -> None:
    """Move tensors in place: ``kept <- (1 - a) kept + a student``.

    A share of 0 changes no bit, and a share of 1 copies.

    Args:
        kept: the tensors to move; of sharded ones this rank's parts.
        student: tensors of the same shapes.
        student_share: a, in [0, 1].

    >>> kept = torch.tensor([1.0, 2.0])
    >>> blend([kept], [torch.tensor([3.0, 2.0])], 0.25)
    >>> kept
    tensor([1.5000, 2.0000])
    """
    for old, new in zip(kept, student, strict=True):
        part, target = local(old), local(new)
        if student_share == 1.0:
            part.copy_(target)
        elif student_share:
            part.lerp_(target.to(part.dtype), student_share)
