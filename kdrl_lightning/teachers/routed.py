"""Several teachers: a column of the prompt row names the one that scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdrl_lightning.common.untyped import HFTokenizer, Row
from kdrl_lightning.engines.base import Completion
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses.logprobs import LOGPROB_FLOOR, TokenScores
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import Sharding
from kdrl_lightning.rollout_batch import RolloutBatch, upload
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.own_prompt.contexts import Context
from kdrl_lightning.teachers.own_prompt.groups import Group, OwnPrompt

# `Any`: transformers has no type that all tokenizers share, and users decide the columns of a
# row.


class RoutedTeacher(Teacher):
    """Scores each completion with the teacher that a column of its prompt row names.

    A teacher must share the student's vocabulary, or be a ``CrossTokenizerTeacher``. No engine in
    this process can sample from a routed teacher.

    Args:
        teachers: the teachers by name, at least one.
        column: column of the prompt row that holds the name.

    Raises:
        ConfigurationError: there is no teacher.
    """

    def __init__(self, teachers: dict[str, Teacher], column: str = "teacher") -> None:
        if not teachers:
            raise ConfigurationError(
                "`teachers` must have at least one teacher: got none. Add one by its name."
            )
        self.teachers = teachers
        self.column = column
        self._order = list(teachers)

    def prepare(self) -> None:
        """Prepare every teacher."""
        for teacher in self.teachers.values():
            teacher.prepare()

    def check(self, student_tokenizer: HFTokenizer, student_path: str) -> None:
        """Compare the tokenizers of the student and every teacher."""
        for teacher in self.teachers.values():
            teacher.check(student_tokenizer, student_path)

    @property
    def tokenizer_path(self) -> str | None:
        """Folder or hub name of the teachers' tokenizer.

        Raises:
            ConfigurationError: the teachers have different tokenizers.
        """
        paths = {teacher.tokenizer_path for teacher in self.teachers.values()}
        if len(paths) > 1:
            raise ConfigurationError(
                f"`teachers` must have one tokenizer in a CrossTokenizerTeacher: got "
                f"{', '.join(sorted(map(str, paths)))}. Wrap each of the teachers instead."
            )
        return paths.pop()

    @property
    def aligns(self) -> bool:  # type: ignore[override]
        """Whether any teacher has another tokenizer than the student."""
        return any(teacher.aligns for teacher in self.teachers.values())

    @property
    def vocabulary_rows(self) -> int | None:
        """Rows of the smallest embedding of the teachers; None if no teacher knows."""
        known = (teacher.vocabulary_rows for teacher in self.teachers.values())
        return min((rows for rows in known if rows is not None), default=None)

    @property
    def context_length(self) -> int | None:
        """Shortest context length of the teachers; None if no teacher knows its own."""
        known = (teacher.context_length for teacher in self.teachers.values())
        return min((length for length in known if length is not None), default=None)

    @property
    def has_own_prompt(self) -> bool:  # type: ignore[override]
        """Whether any teacher has its own prompt."""
        return any(teacher.has_own_prompt for teacher in self.teachers.values())

    @property
    def contexts(self) -> list[Context]:
        """What the teachers read besides the student's prompt."""
        return [part for teacher in self.teachers.values() for part in teacher.contexts]

    def own_prompts(self, groups: Sequence[Group]) -> list[OwnPrompt] | None:
        """Return the prompts of each group's teacher; the student's if it has no other."""
        if not self.has_own_prompt:
            return None
        out = []
        for group in groups:
            prompts = self._of(group.attempts[0].row).own_prompts([group])
            out += prompts or [OwnPrompt(attempt.prompt_ids) for attempt in group.attempts]
        return out

    def lengths(self, batch: RolloutBatch) -> Tensor:
        """Return how many tokens each row's teacher reads."""
        out = batch.lengths.clone()
        for index, rows in rows_of(batch).items():
            found = self.teachers[self._order[index]].lengths(batch.select(rows))
            out[upload(torch.tensor(rows), out.device)] = found
        return out

    def check_row(self, row: Row, tokenizer: HFTokenizer) -> None:
        """Raise if the prompt of the row's teacher cannot be written."""
        self._of(row).check_row(row, tokenizer)

    def check_rows(self, rows: Sequence[Row], tokenizer: HFTokenizer) -> str:
        """Check the contexts of each teacher's rows."""
        lines = []
        for teacher in self.teachers.values():
            of_teacher = [row for row in rows if self._of(row) is teacher]
            lines.append(teacher.check_rows(of_teacher, tokenizer) if of_teacher else "")
        return "; ".join(filter(None, lines))

    def generation_prompt(self, row: Row, prompt_ids: list[int]) -> list[int]:
        """Return the prompt after which the row's teacher samples."""
        return self._of(row).generation_prompt(row, prompt_ids)

    def in_student_tokens(
        self, completions: Sequence[Completion], rows: Sequence[Row], most: int
    ) -> tuple[list[Completion], int]:
        """Return completions in the student's tokens, each translated by its row's teacher."""
        made = [
            self._of(row).in_student_tokens([one], [row], most)
            for one, row in zip(completions, rows, strict=True)
        ]
        return [one for (one,), _ in made], sum(lost for _, lost in made)

    def _of(self, row: Mapping[str, Any]) -> Teacher:
        return self.teachers[self._order[self.route(row)]]

    @property
    def collective(self) -> bool:  # type: ignore[override]
        """Whether any teacher is collective."""
        return any(teacher.collective for teacher in self.teachers.values())

    @property
    def joins(self) -> bool:  # type: ignore[override]
        """Whether every teacher scores several micro-batches in one call."""
        return all(teacher.joins for teacher in self.teachers.values())

    @property
    def knows_entropy(self) -> bool:  # type: ignore[override]
        """Whether every teacher returns entropies; else only some rows and ranks would have one."""
        return all(teacher.knows_entropy for teacher in self.teachers.values())

    @property
    def other_end(self) -> str | None:  # type: ignore[override]
        """The ``other_end`` of the first teacher that has one."""
        return next((t.other_end for t in self.teachers.values() if t.other_end), None)

    @property
    def needs_lora(self) -> bool:  # type: ignore[override]
        """Whether any teacher needs a student with adapters."""
        return any(teacher.needs_lora for teacher in self.teachers.values())

    def spread(self, sharding: Sharding | None) -> None:
        """Set how every teacher is split over ranks."""
        for teacher in self.teachers.values():
            teacher.spread(sharding)

    def check_temperature(self, temperature: float) -> None:
        """Raise if a teacher cannot score at this temperature."""
        for teacher in self.teachers.values():
            teacher.check_temperature(temperature)

    def look_at(self, student: Scorer, path: str) -> None:
        """Pass the student on to every teacher."""
        for teacher in self.teachers.values():
            teacher.look_at(student, path)

    def accept(self, batch: RolloutBatch) -> None:
        """Raise if a teacher cannot score the rows that are routed to it."""
        for index, rows in rows_of(batch).items():
            self.teachers[self._order[index]].accept(batch.select(rows))

    def load(self, device: torch.device) -> None:
        """Load every teacher."""
        for teacher in self.teachers.values():
            teacher.load(device)

    def check_device(self, device: torch.device) -> None:
        """Check the settings of every teacher."""
        for teacher in self.teachers.values():
            teacher.check_device(device)

    def check_fast_path(self) -> None:
        """Compare every teacher's fast path with the plain one."""
        for teacher in self.teachers.values():
            teacher.check_fast_path()

    def release(self) -> None:
        """Free the device memory of every teacher."""
        for teacher in self.teachers.values():
            teacher.release()

    def route(self, row: Mapping[str, Any]) -> int:
        """Return the index of the teacher that the row names.

        Raises:
            ConfigurationError: the row names no known teacher.
        """
        name = row.get(self.column)
        if name not in self._order:
            raise ConfigurationError(
                f"the column `{self.column}` of a prompt row must name one of "
                f"{', '.join(self._order)}: got {name!r}. Add the column to the row, or the "
                "teacher to `teachers`."
            )
        return self._order.index(str(name))

    def score(self, batch: RolloutBatch, topk_ids: Tensor | None = None) -> TokenScores:
        """Score every row with its teacher; see ``Teacher.score``."""
        whole: TokenScores | None = None
        routed = rows_of(batch)
        for index, name in enumerate(self._order):
            if index not in routed:
                if self.teachers[name].collective:  # other ranks may have rows for it
                    self.teachers[name].take_part(batch)
                continue
            part = batch.select(routed[index])
            rows = upload(torch.tensor(routed[index]), batch.input_ids.device)
            asked = None if topk_ids is None else topk_ids[rows, : part.completion_ids.shape[1]]
            scores = self.teachers[name].score(part, asked)
            if self.aligns and scores.chunk_places is None:
                # Each token is a chunk. All ranks need the field, whichever rows they have.
                places = torch.zeros_like(part.completion_ids)
                scores = scores._replace(
                    logprobs=scores.logprobs.clamp(min=LOGPROB_FLOOR), chunk_places=places
                )
            whole = scatter(whole, scores, rows, batch)
        assert whole is not None, "a batch has rows"
        return whole if self.knows_entropy else whole._replace(entropy=None)


def rows_of(batch: RolloutBatch) -> dict[int, list[int]]:
    """Return each teacher's rows, by its index, in increasing order; a GPU is read once."""
    rows: dict[int, list[int]] = {}
    for row, index in enumerate(batch.teacher_route.tolist()):
        rows.setdefault(index, []).append(row)
    return dict(sorted(rows.items()))


def scatter(
    whole: TokenScores | None, part: TokenScores, rows: Tensor, batch: RolloutBatch
) -> TokenScores:
    """Return the scores of a batch with those of some rows written into them.

    Args:
        whole: scores of the batch so far; None before the first part.
        part: scores of the rows, ``[R, T, ...]``; T may be shorter than the batch's.
        rows: ``[R]``, indices of the rows in the batch.
        batch: the whole batch, which gives the shape.

    Returns:
        Scores ``[B, T, ...]``; a field that any part lacks is None.
    """
    shape = batch.completion_ids.shape

    def blank(value: Tensor) -> Tensor:
        return value.new_zeros(*shape, *value.shape[2:])

    out = []
    filled = part.map(blank) if whole is None else whole
    for into, value in zip(filled[:-1], part[:-1], strict=True):  # without `other`: None here
        if into is not None and value is not None:
            into[rows, : value.shape[1]] = value
        out.append(None if value is None else into)
    return TokenScores(*out)  # type: ignore[arg-type]
