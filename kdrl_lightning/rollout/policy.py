"""Protocols with the part of module, trainer and tokenizer that rollouts use.

``KDRLModule`` is a ``Policy`` and Lightning's ``Trainer`` a ``Run``. Tests of rollouts need neither
Lightning nor a real run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from kdrl_lightning.models.end_tokens import EndTokens
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.objectives.base import Objective
from kdrl_lightning.rollout_batch import RolloutBatch
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.frozen import FrozenModels


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that completions and exports need.

    We use a protocol because the tokenizer classes have no typed base class.
    """

    @property
    def eos_token_id(self) -> int:
        """The token that ends a text."""

    @property
    def pad_token_id(self) -> int | None:
        """The token that pads rows; None if the tokenizer has none."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, list[int]]:
        """Return a mapping whose ``input_ids`` are the token ids of a text."""

    def decode(self, token_ids: int) -> str:
        """Return the text of a token."""

    def batch_decode(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        skip_special_tokens: bool,
        clean_up_tokenization_spaces: bool,
    ) -> list[str]:
        """Return the text of each sequence."""

    def save_pretrained(self, save_directory: str) -> object:
        """Write the tokenizer's files to a folder."""


class Policy(Protocol):
    """The student with its teacher and objective.

    Attributes:
        objective: names the scores that the updates read, and prepares a rollout for them.
        teacher: the frozen teacher; None without one.
    """

    objective: Objective
    teacher: Teacher | None

    @property
    def teacher_seconds(self) -> float:
        """Seconds that the teacher took to score."""

    @property
    def frozen(self) -> FrozenModels:
        """The frozen models: teacher and reference."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The student's tokenizer."""

    @property
    def end_tokens(self) -> EndTokens:
        """The tokens that end a completion of the student."""

    @property
    def student_path(self) -> str:
        """Folder or hub name that the student was loaded from."""

    @property
    def context_length(self) -> int:
        """Most tokens, of prompt and completion together, that the student can read."""

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the student's embedding: every token id must be smaller."""

    @property
    def device(self) -> torch.device:
        """The student's device."""

    def weights(self) -> ModelWeights:
        """Return the student's current weights."""

    def score(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with the student's scores."""

    def score_reference(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with the reference's scores, if the objective needs them."""

    def score_teacher(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with the teacher's scores, if there is a teacher."""

    def prepare(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with the fields that the objective sets once per rollout."""

    def reduce(self, value: Tensor, operation: str) -> Tensor:
        """Return a tensor reduced over ranks by ``sum`` or ``max``."""


class Precision(Protocol):
    """Lightning's precision plugin."""

    def forward_context(self) -> AbstractContextManager[None]:
        """Return the context in which models run."""


class Run(Protocol):
    """The part of Lightning's ``Trainer`` that rollouts read."""

    @property
    def global_step(self) -> int:
        """Optimizer steps taken so far."""

    @property
    def global_rank(self) -> int:
        """Rank of this process."""

    @property
    def world_size(self) -> int:
        """Number of processes."""

    @property
    def estimated_stepping_batches(self) -> float:
        """Optimizer steps of the whole run."""

    @property
    def optimizers(self) -> Sequence[object]:
        """The optimizers; none in a run that does not train."""

    @property
    def precision(self) -> str:
        """Name of the precision, such as ``bf16-mixed``."""

    @property
    def precision_plugin(self) -> Precision:
        """Lightning's plugin, which sets the types that models compute in."""

    @property
    def accumulate_grad_batches(self) -> int:
        """Micro-batches of an optimizer step."""
