"""A teacher that reads another prompt than the student."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from kdrl_lightning.common.untyped import HFTokenizer, Row
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses.logprobs import Other, TokenScores
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.rollout_batch import RolloutBatch
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.own_prompt.checks import check_row, check_rows
from kdrl_lightning.teachers.own_prompt.contexts import Context, RowContext
from kdrl_lightning.teachers.own_prompt.groups import Group, OwnPrompt, as_read
from kdrl_lightning.teachers.own_prompt.prompt import TeacherPrompt
from kdrl_lightning.teachers.wrapped import WrappedTeacher


class PromptedTeacher(WrappedTeacher):
    """Scores the student's completions after a different prompt.

    Any teacher can be wrapped. It reads its prompt and then exactly the tokens that the student
    sampled. Prompts are written once per rollout, after its completions have their rewards, and
    travel in ``RolloutBatch.teacher_prompt_ids``. A completion without a context is scored after
    the student's prompt, and not imitated (``RolloutBatch.has_context``).

    Args:
        teacher: the teacher that scores.
        prompt: the prompt that it reads.

    Raises:
        ConfigurationError: the wrapped teacher already has its own prompt.
    """

    has_own_prompt = True

    def __init__(self, teacher: Teacher, prompt: TeacherPrompt) -> None:
        super().__init__(teacher)
        if teacher.has_own_prompt:
            raise ConfigurationError(
                "`teacher` of a PromptedTeacher must read the student's prompt: got one that has "
                "its own prompt. Keep one PromptedTeacher and combine the contexts; a "
                "CrossTokenizerTeacher goes around it."
            )
        self.prompt = prompt
        self._tokenizer: HFTokenizer = None  # until `check` or `check_row`

    @property
    def contexts(self) -> list[Context]:
        """The contexts that the prompt shows, nested ones included."""
        return [] if self.prompt.context is None else list(self.prompt.context.parts())

    def check(self, student_tokenizer: HFTokenizer, student_path: str) -> None:
        """Check the wrapped teacher, and keep the tokenizer for writing prompts."""
        super().check(student_tokenizer, student_path)
        self._tokenizer = student_tokenizer

    def check_row(self, row: Row, tokenizer: HFTokenizer) -> None:
        """Raise if the prompt of a row cannot be written; keep the tokenizer, as ``check`` does."""
        self._tokenizer = tokenizer
        check_row(self.prompt, row, tokenizer, self._vocabulary)

    @cached_property
    def _vocabulary(self) -> int | None:
        return self.vocabulary_rows  # reads the model's configuration

    def check_rows(self, rows: Sequence[Row], tokenizer: HFTokenizer) -> str:
        """Check the contexts that are known before a run; see ``Teacher.check_rows``."""
        return check_rows(self.prompt, rows, tokenizer, min(self._longest()))

    @property
    def generates(self) -> bool:  # type: ignore[override]
        """Whether it can sample completions: its prompts must follow from the rows alone."""
        known = self.prompt.context is None or isinstance(self.prompt.context, RowContext)
        return known and self.teacher.generates

    def generation_prompt(self, row: Row, prompt_ids: list[int]) -> list[int]:
        """Return the teacher's own prompt; the student's for a row without a context."""
        return self.prompt_of_row(row) or prompt_ids

    def own_prompts(self, groups: Sequence[Group]) -> list[OwnPrompt]:
        """Return the prompt of every completion, in the order of the batch."""
        longest = self._longest()  # reads the model's configuration
        return [prompt for group in groups for prompt in self._of_group(group, *longest)]

    def prompt_of_row(self, row: Row) -> list[int] | None:
        """Return the teacher's prompt of a row before anything is sampled.

        None if the row has no context, its prompt is too long or cannot be rendered, or the context
        is made of completions.
        """
        context = self.prompt.context
        if context is not None and not isinstance(context, RowContext):
            return None
        text = "" if context is None else context.of_row(row)
        ids = None if text is None else self._written(row, text)
        return ids if ids is not None and len(ids) <= min(self._longest()) else None

    def _of_group(self, group: Group, prompt: float, whole: float) -> list[OwnPrompt]:
        """Return the prompts of a group; drop contexts that make a sequence too long.

        Args:
            group: the completions.
            prompt: maximum length of a prompt, in tokens.
            whole: maximum length of prompt plus completion, in tokens.
        """
        context = self.prompt.context
        texts = [""] * len(group.attempts) if context is None else context.of_group(group)
        written: dict[str, list[int] | None] = {}  # completions of a group often share a context
        out = []
        for attempt, text in zip(group.attempts, texts, strict=True):
            if text is None:
                out.append(OwnPrompt(attempt.prompt_ids, has_context=False))
                continue
            if text not in written:
                written[text] = self._written(attempt.row, text)
            ids = written[text]
            if ids is None or len(ids) > min(prompt, whole - len(attempt.completion.ids)):
                out.append(OwnPrompt(attempt.prompt_ids, has_context=False, dropped=True))
            else:
                out.append(OwnPrompt(ids))
        return out

    def _written(self, row: Row, text: str) -> list[int] | None:
        """Return the prompt's ids; None if it cannot be rendered, e.g. with a sampled context."""
        try:
            return self.prompt.ids(self._tokenizer, row, text)
        except ConfigurationError:
            return None

    def _longest(self) -> tuple[float, float]:
        """Return the maximum length of a prompt, and of prompt plus completion, in tokens."""
        limit, context = self.prompt.max_tokens, self.context_length
        return (
            float("inf") if limit is None else limit,
            float("inf") if context is None else context,
        )

    def weights(self) -> ModelWeights | None:
        """Return None: an evaluation of the teacher would sample after the student's prompt."""
        return None

    def accept(self, batch: RolloutBatch) -> None:
        """Raise if the wrapped teacher cannot score the completions after its prompts."""
        self.teacher.accept(as_read(batch))

    def score(self, batch: RolloutBatch, topk_ids: Tensor | None = None) -> TokenScores:
        """Score the completions after the teacher's prompts; see ``Teacher.score``."""
        return self.teacher.score(as_read(batch), topk_ids)

    def take_part(self, batch: RolloutBatch) -> None:
        """Join the wrapped teacher's collectives."""
        self.teacher.take_part(as_read(batch))

    def states(self, batch: RolloutBatch) -> Other:
        """Return states after the teacher's prompts; rows equal for the student may differ."""
        return self.teacher.states(as_read(batch))._replace(per_row=True)
