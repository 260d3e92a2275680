"""A teacher with another tokenizer than the student's."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kdrl_lightning.common.untyped import HFTokenizer, Row
from kdrl_lightning.engines.base import Completion
from kdrl_lightning.errors import ConfigurationError, TrainingStopped, require_count
from kdrl_lightning.losses.logprobs import LOGPROB_FLOOR, Other, TokenScores
from kdrl_lightning.losses.teacher_chunks import chunk_totals
from kdrl_lightning.models.end_tokens import EndTokens, end_tokens
from kdrl_lightning.models.pretrained import Pretrained
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.prompts.encoding import encode_prompt
from kdrl_lightning.rollout_batch import RolloutBatch, collate, pad_rows, upload
from kdrl_lightning.teachers.base import OwnVocabulary, Teacher
from kdrl_lightning.teachers.cross_tokenizer import (
    Aligner,
    AlignmentWorker,
    Chunked,
    Job,
    TokenBytes,
    Translator,
)
from kdrl_lightning.teachers.cross_tokenizer.chunks import Ints
from kdrl_lightning.teachers.own_prompt.groups import Group, OwnPrompt
from kdrl_lightning.teachers.tokenizers import check_same_vocabulary, same_rules
from kdrl_lightning.teachers.wrapped import WrappedTeacher

# `Any`: transformers has no type that all tokenizers share.


class CrossTokenizerTeacher(WrappedTeacher):
    """Scores completions with a teacher that has another tokenizer.

    The teacher's tokenizer encodes the completion's bytes, and its chat template renders the
    prompt. Both token sequences are cut into minimal chunks of the same bytes; the end token is a
    chunk. A token gets the teacher's log-probability of its whole chunk, as the teacher's tokenizer
    writes it, and the sampled-token methods (KDRL with k2, k3 or policy gradient, RLAD, ...)
    compare chunks. ``docs/methods/cross_tokenizer.md`` says what that means.

    If both tokenizers are the same, the teacher scores the student's tokens as they are: only the
    prompt and the end token are the teacher's.

    Args:
        teacher: the teacher, of any kind.
        max_chunk_tokens: longest chunk, in tokens of either side; the teacher's scores of longer
            chunks are left out and counted in ``kd/unaligned_frac``. None: no limit.

    Raises:
        ConfigurationError: ``max_chunk_tokens`` is below 1, or the teacher is or contains a
            CrossTokenizerTeacher.
    """

    def __init__(self, teacher: Teacher, max_chunk_tokens: int | None = 32) -> None:
        super().__init__(teacher)
        if _translates(teacher):
            raise ConfigurationError(
                "`teacher` of a CrossTokenizerTeacher must not be or contain another one: got "
                f"{type(teacher).__name__}. Remove one of the two."
            )
        if max_chunk_tokens is not None:
            require_count("max_chunk_tokens", max_chunk_tokens, 1, float("inf"))
        self.max_chunk_tokens = max_chunk_tokens
        self._worker: AlignmentWorker | None = None
        self._translator: Translator | None = None
        self._student_ends: EndTokens | None = None
        self._digest = ""
        self._ends: frozenset[int] = frozenset()  # of the student
        self._warned = False

    @property
    def has_own_prompt(self) -> bool:  # type: ignore[override]
        """Whether it has its own tokenizer, or the wrapped teacher reads its own prompt."""
        return self._theirs is not None or self.teacher.has_own_prompt

    @property
    def vocabulary_rows(self) -> int | None:
        """Rows of the wrapped teacher's embedding, if it reads the student's ids; else None."""
        return self.teacher.vocabulary_rows if self._theirs is None else None

    @property
    def context_length(self) -> int | None:
        """Context length in the teacher's tokens; as configured, until servers report theirs."""
        known = self.teacher.context_length
        return self._theirs.context_length if known is None and self._theirs else known

    @property
    def other_end(self) -> str | None:  # type: ignore[override]
        """The wrapped teacher's ``other_end``; None with its own tokenizer: ends are translated."""
        return self.teacher.other_end if self._theirs is None else None

    @property
    def aligns(self) -> bool:  # type: ignore[override]
        """Whether the tokens differ from the student's."""
        return self._worker is not None

    def weights(self) -> ModelWeights | None:
        """Return the wrapped teacher's weights; None if its tokens are not the student's."""
        return None if self.aligns else self.teacher.weights()

    @property
    def knows_entropy(self) -> bool:  # type: ignore[override]
        """Whether the tokens are the student's, and the wrapped teacher returns entropies."""
        return not self.aligns and self.teacher.knows_entropy

    def check(self, student_tokenizer: HFTokenizer, student_path: str) -> None:
        """Compare the tokenizers, and prepare the alignment if they differ.

        Raises:
            ConfigurationError: a tokenizer has no map from tokens to bytes, or the teacher's
                changes the text.
        """
        theirs = self._theirs
        if theirs is None:
            self.teacher.check(student_tokenizer, student_path)
            return
        ends = end_tokens(student_path, student_tokenizer)
        self._ends = frozenset(ends.ids)
        self._student_ends = ends
        self._worker = self._translator = None
        with warnings.catch_warnings():
            # The teacher's own template renders its prompts, and the student cannot sample tokens
            # that only the teacher has.
            warnings.filterwarnings("ignore", "the chat templates of|the teacher .* has")
            if same_vocabulary(student_tokenizer, theirs.tokenizer):
                self.teacher.check(student_tokenizer, student_path)
                return
            self.teacher.check(theirs.tokenizer, theirs.path)
        student = TokenBytes(student_tokenizer, student_path, ends.ids)
        teacher = TokenBytes(theirs.tokenizer, theirs.path, theirs.end_tokens.ids)
        aligner = Aligner(student, teacher, ends.ids, self.max_chunk_tokens)
        aligner.refuse_changed_text()
        self._worker = AlignmentWorker(aligner)
        self._translator = Translator(teacher, student, theirs.end_tokens.ids)
        spec = json.dumps(student.spec, sort_keys=True)
        self._digest = hashlib.sha256(spec.encode()).hexdigest()

    def check_row(self, row: Row, tokenizer: HFTokenizer) -> None:
        """Raise if the teacher's template cannot render the row, or the prompt does not fit."""
        theirs = self._theirs
        if theirs is not None:
            self._prompt(theirs, row)
        self.teacher.check_row(row, tokenizer if theirs is None else theirs.tokenizer)

    def check_rows(self, rows: Sequence[Row], tokenizer: HFTokenizer) -> str:
        """Check the contexts of the wrapped teacher; see ``Teacher.check_rows``."""
        theirs = self._theirs
        return self.teacher.check_rows(rows, tokenizer if theirs is None else theirs.tokenizer)

    def own_prompts(self, groups: Sequence[Group]) -> list[OwnPrompt] | None:
        """Return each prompt as the teacher's tokenizer and chat template write it."""
        inner = self.teacher.own_prompts(groups)
        if self._theirs is None:
            return inner
        out = []
        for group in groups:
            # All completions of a group have the same row.
            own = self._prompt(self._theirs, group.attempts[0].row)
            out += [own] * len(group.attempts)
        if inner is None:
            return out
        # The wrapped teacher's own prompt, unless it falls back to the student's.
        attempts = [attempt for group in groups for attempt in group.attempts]
        return [
            replace(
                theirs, end=own.end, ids=own.ids if theirs.ids is one.prompt_ids else theirs.ids
            )
            for one, own, theirs in zip(attempts, out, inner, strict=True)
        ]

    def generation_prompt(self, row: Row, prompt_ids: list[int]) -> list[int]:
        """Return the row's prompt in the teacher's tokens, for the teacher to sample after."""
        theirs = self._theirs
        own = prompt_ids if theirs is None else self._prompt(theirs, row).ids
        return self.teacher.generation_prompt(row, own)

    def in_student_tokens(
        self, completions: Sequence[Completion], rows: Sequence[Row], most: int
    ) -> tuple[list[Completion], int]:
        """Return the teacher's completions re-encoded for the student; see ``Teacher``."""
        if self._translator is None or self._student_ends is None:
            return self.teacher.in_student_tokens(completions, rows, most)
        ends = [self._student_ends.closing(row.get("prompt")) for row in rows]
        return self._translator(completions, ends, most)

    @property
    def own_vocabulary(self) -> OwnVocabulary | None:
        """The teacher's end tokens and number of tokens; None if its tokens are the student's."""
        if self._theirs is None or self._worker is None:
            return None
        size = len(self._worker.aligner.teacher.pieces) - 1
        return OwnVocabulary(self._theirs.end_tokens.ids, size)

    def _prompt(self, theirs: Pretrained, row: Row) -> OwnPrompt:
        """Return a row's prompt with the teacher's end token.

        Raises:
            ConfigurationError: the template cannot render the row, or the prompt does not fit.
        """
        ids = encode_prompt(theirs.tokenizer, row, theirs.end_tokens.ids)
        if len(ids) >= theirs.context_length:
            raise ConfigurationError(
                f"a prompt must leave room in the teacher's context of {theirs.context_length} "
                f"tokens: got {len(ids)} tokens of {theirs.path}. Remove the row."
            )
        return OwnPrompt(ids, end=theirs.end_tokens.closing(row["prompt"]))

    def accept(self, batch: RolloutBatch) -> None:
        """Start to align a rollout's completions in a thread, while the student scores them."""
        if self._worker is not None:
            self._worker.start(self._jobs(batch))

    def lengths(self, batch: RolloutBatch) -> Tensor:
        """Return how many of its own tokens the teacher reads, once they are aligned."""
        if self._worker is None:
            return super().lengths(batch)
        own = [len(row.teacher_ids) for row in self._rows(batch)]
        prompts = [len(prompt) for prompt in self._prompts(batch)[0]]
        return torch.tensor(own) + torch.tensor(prompts)

    @torch.no_grad()
    def score(self, batch: RolloutBatch, topk_ids: Tensor | None = None) -> TokenScores:
        """Score the sampled tokens; a token gets its chunk's sum. See ``Teacher.score``."""
        if self._worker is None:
            return self.teacher.score(self._same_tokens(batch), topk_ids)
        rows = self._rows(batch)
        scores = self.teacher.score(self._other_tokens(batch, rows))
        device = batch.input_ids.device

        def table(values: Sequence[Ints], filler: int = 0) -> Tensor:
            return upload(pad_rows(values, filler, torch.long), device)  # type: ignore[arg-type]

        places = table([row.places for row in rows])
        theirs = scores.logprobs.clamp(min=LOGPROB_FLOOR)
        totals = chunk_totals(theirs, table([row.teacher_places for row in rows]))
        logprobs = totals.gather(1, table([row.columns for row in rows]))
        used = batch.completion_mask & (places >= 0)
        return TokenScores(logprobs.masked_fill(~used, 0.0), None, chunk_places=places)

    def states(self, batch: RolloutBatch) -> Other:
        """Return the wrapped teacher's states, if the tokens are the student's."""
        return self.teacher.states(self._same_tokens(batch))._replace(per_row=True)

    def take_part(self, batch: RolloutBatch) -> None:
        """Join the collectives of the wrapped teacher with one completion."""
        one = batch.select([0])
        same = self._worker is None
        self.teacher.take_part(
            self._same_tokens(one) if same else self._other_tokens(one, self._rows(one))
        )

    def fingerprint(self) -> str:
        """Return the wrapped teacher's fingerprint with the student's tokenizer and chunk limit."""
        return f"{self.teacher.fingerprint()} {self._digest} {self.max_chunk_tokens}"

    @cached_property
    def _theirs(self) -> Pretrained | None:
        """The teacher's tokenizer; None if it is the student's."""
        path = self.teacher.tokenizer_path
        return None if path is None else Pretrained(path)

    def _same_tokens(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with the teacher's prompts and end tokens, and the student's tokens."""
        if self._theirs is None:
            return batch
        ids, lengths = batch.completion_ids.tolist(), batch.completion_lengths.tolist()
        prompts, ends = self._prompts(batch)
        own = [row[:n] for row, n in zip(ids, lengths, strict=True)]
        if self.teacher.other_end is not None:  # the wrapped teacher does not translate end tokens
            own = [
                [*row[:-1], end] if row and row[-1] in self._ends else row
                for row, end in zip(own, ends, strict=True)
            ]
        return self._with(batch, prompts, own)

    def _other_tokens(self, batch: RolloutBatch, rows: Sequence[Chunked]) -> RolloutBatch:
        """Return the batch in the teacher's tokens."""
        return self._with(batch, self._prompts(batch)[0], [r.teacher_ids.tolist() for r in rows])

    def _with(
        self, batch: RolloutBatch, prompts: list[list[int]], completions: list[list[int]]
    ) -> RolloutBatch:
        made = collate(
            prompts,
            completions,
            batch.group_ids.tolist(),
            pad_id=0,
            teacher_route=batch.teacher_route.tolist(),
        )
        # A wrapped teacher with its own prompt reads it from the batch.
        return made.to(batch.input_ids.device).replace(
            temperature=batch.temperature, teacher_prompt_ids=batch.teacher_prompt_ids
        )

    def _prompts(self, batch: RolloutBatch) -> tuple[list[list[int]], list[int]]:
        """Return the teacher's prompt and end token of each completion."""
        own = batch.layout.teacher_prompt_ids
        if own is None or batch.teacher_ends is None:
            raise TrainingStopped(
                "completions must have been sampled with the teacher's own prompt and end token: "
                "got some without. Use RolloutDataModule; if you resume with another teacher, use "
                "a checkpoint written at the end of a rollout."
            )
        prompts = [[i for i in row if i >= 0] for row in own.tolist()]
        return prompts, batch.teacher_ends.tolist()

    def _jobs(self, batch: RolloutBatch) -> list[Job]:
        ids = batch.layout.completion_ids.numpy()
        prompts, ends = self._prompts(batch)
        assert self._theirs is not None
        context = self._theirs.context_length
        return [
            Job(row[:n].tobytes(), end, context - len(prompt))
            for row, (_, n, _), end, prompt in zip(
                ids, batch.layout.sizes, ends, prompts, strict=True
            )
        ]

    def _rows(self, batch: RolloutBatch) -> list[Chunked]:
        assert self._worker is not None
        rows = self._worker.rows(self._jobs(batch))
        self._warn_of_changed_text(batch, rows)
        return rows

    def _warn_of_changed_text(self, batch: RolloutBatch, rows: Sequence[Chunked]) -> None:
        """Warn once, with the byte at which the teacher's tokenizer changes a completion."""
        changed = [n for n, row in enumerate(rows) if row.differs_at is not None]
        if self._warned or not changed:
            return
        row = changed[0]
        at = rows[row].differs_at or 0
        self._warned = True
        assert self._worker is not None and self._theirs is not None
        tokens = self._worker.aligner.student
        ids = batch.completion_ids[row, : int(batch.completion_lengths[row])].cpu().numpy()
        text = b"".join(tokens.pieces[i] or b"" for i in tokens.index(ids))
        warnings.warn(
            f"the tokenizer of the teacher {self._theirs.path} does not write a completion as it "
            f"is, first at byte {at}, after {text[max(at - 16, 0) : at]!r}. The teacher does not "
            "score the rest of such completions; kd/unaligned_frac counts the tokens.",
            stacklevel=2,
        )


def _translates(teacher: Teacher) -> bool:
    """Return whether a teacher, or one that it wraps, is a CrossTokenizerTeacher."""
    several = getattr(teacher, "teachers", {}).values()  # only wrappers have these two
    inner = [*several, *filter(None, [getattr(teacher, "teacher", None)])]
    return isinstance(teacher, CrossTokenizerTeacher) or any(map(_translates, inner))


def same_vocabulary(student: Any, teacher: Any) -> bool:
    """Return whether both tokenizers write a text in the same tokens.

    Ids must mean the same, and merges must be the same. A teacher may have more added tokens, but
    no more ordinary ones, because it would write texts with these.
    """
    try:
        check_same_vocabulary(student, teacher, "", "")
    except ConfigurationError:
        return False
    if not same_rules(student, teacher):
        return False
    more = set(teacher.get_vocab().values()) - set(student.get_vocab().values())
    return more <= set(teacher.added_tokens_decoder)
