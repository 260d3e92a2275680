"""The base of teachers that wrap another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdrl_lightning.common.untyped import HFTokenizer, Row
from kdrl_lightning.engines.base import Completion
from kdrl_lightning.losses.logprobs import Other, TokenScores
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import Sharding
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rollout_batch import RolloutBatch
from kdrl_lightning.teachers.base import OwnVocabulary, Teacher
from kdrl_lightning.teachers.own_prompt.contexts import Context
from kdrl_lightning.teachers.own_prompt.groups import Group, OwnPrompt

# `Any`: transformers has no type that all tokenizers share, and users decide the columns of a
# row.


class WrappedTeacher(Teacher):
    """Passes everything on to the wrapped teacher; a subclass changes what it needs to.

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
    def moves(self) -> bool:  # type: ignore[override]
        """Whether the wrapped teacher's weights follow the student's."""
        return self.teacher.moves

    @property
    def gives_states(self) -> bool:  # type: ignore[override]
        """Whether the wrapped teacher gives hidden states."""
        return self.teacher.gives_states

    @property
    def model_name(self) -> str | None:
        """Folder or hub name of the wrapped teacher's model."""
        return self.teacher.model_name

    @property
    def tokenizer_path(self) -> str | None:
        """Folder or hub name of the wrapped teacher's tokenizer."""
        return self.teacher.tokenizer_path

    @property
    def aligns(self) -> bool:  # type: ignore[override]
        """Whether the wrapped teacher has another tokenizer than the student."""
        return self.teacher.aligns

    @property
    def vocabulary_rows(self) -> int | None:
        """Rows of the wrapped teacher's embedding."""
        return self.teacher.vocabulary_rows

    @property
    def context_length(self) -> int | None:
        """The wrapped teacher's context length."""
        return self.teacher.context_length

    @property
    def has_own_prompt(self) -> bool:  # type: ignore[override]
        """Whether the wrapped teacher has its own prompt."""
        return self.teacher.has_own_prompt

    @property
    def contexts(self) -> Sequence[Context]:
        """What the wrapped teacher reads besides the student's prompt."""
        return self.teacher.contexts

    def own_prompts(self, groups: Sequence[Group]) -> list[OwnPrompt] | None:
        """Return the wrapped teacher's prompts."""
        return self.teacher.own_prompts(groups)

    def lengths(self, batch: RolloutBatch) -> Tensor:
        """Return how many tokens the wrapped teacher reads."""
        return self.teacher.lengths(batch)

    def check_row(self, row: Row, tokenizer: HFTokenizer) -> None:
        """Raise if the wrapped teacher's prompt of a row cannot be written."""
        self.teacher.check_row(row, tokenizer)

    def check_rows(self, rows: Sequence[Row], tokenizer: HFTokenizer) -> str:
        """Check the wrapped teacher's contexts."""
        return self.teacher.check_rows(rows, tokenizer)

    def prepare(self) -> None:
        """Prepare the wrapped teacher."""
        self.teacher.prepare()

    def check(self, student_tokenizer: HFTokenizer, student_path: str) -> None:
        """Compare the tokenizers of the student and the wrapped teacher."""
        self.teacher.check(student_tokenizer, student_path)

    @property
    def other_end(self) -> str | None:  # type: ignore[override]
        """The wrapped teacher's ``other_end``."""
        return self.teacher.other_end

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

    def spread(self, sharding: Sharding | None) -> None:
        """Set how the wrapped teacher is split over ranks."""
        self.teacher.spread(sharding)

    def check_temperature(self, temperature: float) -> None:
        """Raise if the wrapped teacher cannot score at this temperature."""
        self.teacher.check_temperature(temperature)

    def look_at(self, student: Scorer, path: str) -> None:
        """Pass the student on to the wrapped teacher."""
        self.teacher.look_at(student, path)

    def accept(self, batch: RolloutBatch) -> None:
        """Raise if the wrapped teacher cannot score these completions."""
        self.teacher.accept(batch)

    def check_device(self, device: torch.device) -> None:
        """Check the wrapped teacher's settings."""
        self.teacher.check_device(device)

    def check_fast_path(self) -> None:
        """Compare the wrapped teacher's fast path with the plain one."""
        self.teacher.check_fast_path()

    def load(self, device: torch.device) -> None:
        """Load the wrapped teacher."""
        self.teacher.load(device)

    def release(self) -> None:
        """Free the device memory of the wrapped teacher."""
        self.teacher.release()

    def route(self, row: Mapping[str, Any]) -> int:
        """Return the wrapped teacher's route."""
        return self.teacher.route(row)

    def generation_prompt(self, row: Row, prompt_ids: list[int]) -> list[int]:
        """Return the prompt after which the wrapped teacher samples."""
        return self.teacher.generation_prompt(row, prompt_ids)

    def in_student_tokens(
        self, completions: Sequence[Completion], rows: Sequence[Row], most: int
    ) -> tuple[list[Completion], int]:
        """Return completions of the wrapped teacher in the student's tokens."""
        return self.teacher.in_student_tokens(completions, rows, most)

    @property
    def own_vocabulary(self) -> OwnVocabulary | None:
        """The wrapped teacher's vocabulary, if it is not the student's."""
        return self.teacher.own_vocabulary

    def sampling_weights(self) -> ModelWeights | None:
        """Return the weights that sample the wrapped teacher's completions."""
        return self.teacher.sampling_weights()

    def weights(self) -> ModelWeights | None:
        """Return the wrapped teacher's weights."""
        return self.teacher.weights()

    def states(self, batch: RolloutBatch) -> Other:
        """Return the wrapped teacher's states."""
        return self.teacher.states(batch)

    def fingerprint(self) -> str:
        """Return the wrapped teacher's fingerprint."""
        return self.teacher.fingerprint()

    def score(self, batch: RolloutBatch, topk_ids: Tensor | None = None) -> TokenScores:
        """Return the wrapped teacher's scores; see ``Teacher.score``."""
        return self.teacher.score(batch, topk_ids)

    def take_part(self, batch: RolloutBatch) -> None:
        """Join the wrapped teacher's collectives."""
        self.teacher.take_part(batch)
