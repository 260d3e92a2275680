"""What rollouts ask of the module that is trained, and of the trainer that runs it.

``KDRLModule`` is a ``Policy`` and Lightning's ``Trainer`` a ``Run``. Rollouts know no more of them,
so they need neither Lightning nor a real run in a test.
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

    Its classes share no base with types: each loads its own.
    """

    @property
    def eos_token_id(self) -> int:
        """The token that ends a text."""

    @property
    def pad_token_id(self) -> int | None:
        """The token that fills rows up, if there is one."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, list[int]]:
        """Return the ids of a text under ``input_ids``."""

    def decode(self, token_ids: int) -> str:
        """Return the text of a token."""

    def batch_decode(
        self, sequences: Sequence[Sequence[int]], *, skip_special_tokens: bool
    ) -> list[str]:
        """Return the text of each sequence."""

    def save_pretrained(self, save_directory: str) -> object:
        """Write it to a folder."""


class Policy(Protocol):
    """The student with its teacher and objective.

    Attributes:
        objective: says which scores the updates read, and prepares a rollout for them.
        teacher: the frozen teacher, if there is one.
    """

    objective: Objective
    teacher: Teacher | None

    @property
    def teacher_seconds(self) -> float:
        """Time that the teacher took to score."""

    @property
    def frozen(self) -> FrozenModels:
        """Teacher and reference."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The student's tokenizer."""

    @property
    def end_tokens(self) -> EndTokens:
        """The tokens that end a completion of the student."""

    @property
    def student_path(self) -> str:
        """Folder or hub name of the student before training."""

    @property
    def context_length(self) -> int:
        """Longest sequence, prompt and completion together, that the student can take."""

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the student's embedding: every token id must be below."""

    @property
    def device(self) -> torch.device:
        """Where the student is."""

    def weights(self) -> ModelWeights:
        """Return the student's live weights."""

    def score(self, batch: RolloutBatch) -> RolloutBatch:
        """Add what the student says of completions."""

    def score_reference(self, batch: RolloutBatch) -> RolloutBatch:
        """Add what the initial student says, if the objective needs it."""

    def score_teacher(self, batch: RolloutBatch) -> RolloutBatch:
        """Add what the teacher says, if there is one."""

    def prepare(self, batch: RolloutBatch) -> RolloutBatch:
        """Let the objective decide what holds for a whole rollout."""

    def reduce(self, value: Tensor, operation: str) -> Tensor:
        """Reduce a tensor over ranks; ``sum`` or ``max``."""


class Precision(Protocol):
    """Lightning's precision plugin."""

    def forward_context(self) -> AbstractContextManager[None]:
        """Return the context in which a model computes."""


class Run(Protocol):
    """The trainer of a run."""

    @property
    def global_step(self) -> int:
        """Optimizer steps taken so far."""

    @property
    def global_rank(self) -> int:
        """The number of this process."""

    @property
    def world_size(self) -> int:
        """How many processes there are."""

    @property
    def estimated_stepping_batches(self) -> float:
        """Optimizer steps of the whole run."""

    @property
    def precision(self) -> str:
        """Its name, such as ``bf16-mixed``; Lightning's type is wider."""

    @property
    def precision_plugin(self) -> Precision:
        """In what types the models compute."""

    @property
    def accumulate_grad_batches(self) -> int:
        """Micro-batches of an optimizer step."""
