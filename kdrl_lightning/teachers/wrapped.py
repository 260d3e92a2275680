"""The base of teachers that ask another teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import Sharding
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.teachers.base import Teacher, TeacherPrompt

# `Any`: users decide the columns of a row.


class WrappedTeacher(Teacher):
    """Answers as the wrapped teacher does, until a subclass says otherwise.

    Args:
        teacher: the wrapped teacher.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    @property
    def generates(self) -> bool:  # type: ignore[override]
        """Whether the wrapped teacher generates."""
        return self.teacher.generates

    @property
    def gives_states(self) -> bool:  # type: ignore[override]
        """Whether the wrapped teacher gives hidden states."""
        return self.teacher.gives_states

    @property
    def collective(self) -> bool:  # type: ignore[override]
        """Whether the wrapped teacher is collective."""
        return self.teacher.collective

    @property
    def joins(self) -> bool:  # type: ignore[override]
        """Whether the wrapped teacher scores several micro-batches in one call."""
        return self.teacher.joins

    @property
    def knows_entropy(self) -> bool:  # type: ignore[override]
        """Whether the wrapped teacher returns entropies."""
        return self.teacher.knows_entropy

    @property
    def needs_lora(self) -> bool:  # type: ignore[override]
        """Whether the wrapped teacher needs a student with adapters."""
        return self.teacher.needs_lora

    @property
    def model_name(self) -> str | None:
        """Folder or hub name of the wrapped teacher's model."""
        return self.teacher.model_name

    @property
    def tokenizer_path(self) -> str | None:
        """Folder or hub name of the wrapped teacher's tokenizer."""
        return self.teacher.tokenizer_path

    def prepare(self) -> None:
        """Prepare the wrapped teacher."""
        self.teacher.prepare()

    def spread(self, sharding: Sharding | None) -> None:
        """Set how the wrapped teacher is split over ranks."""
        self.teacher.spread(sharding)

    def check_temperature(self, temperature: float) -> None:
        """Raise if the wrapped teacher cannot score at this temperature."""
        self.teacher.check_temperature(temperature)

    def look_at(self, student: Scorer, path: str) -> None:
        """Pass the student on to the wrapped teacher."""
        self.teacher.look_at(student, path)

    def load(self, device: torch.device) -> None:
        """Load the wrapped teacher."""
        self.teacher.load(device)

    def release(self) -> None:
        """Free the device memory of the wrapped teacher."""
        self.teacher.release()

    def route(self, row: Mapping[str, Any]) -> int:
        """Return the wrapped teacher's route."""
        return self.teacher.route(row)

    def prompt(self, row: Mapping[str, Any]) -> TeacherPrompt | None:
        """Return the prompt that the wrapped teacher reads."""
        return self.teacher.prompt(row)

    def weights(self) -> ModelWeights | None:
        """Return the wrapped teacher's weights."""
        return self.teacher.weights()
