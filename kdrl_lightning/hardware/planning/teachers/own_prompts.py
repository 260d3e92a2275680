"""Computes how many tokens a teacher reads, with its own prompt or its own tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from kdrl_lightning.hardware.planning.job import Job
from kdrl_lightning.hardware.planning.shapes import config_of
from kdrl_lightning.models.architectures.load_errors import TOKENIZERS
from kdrl_lightning.models.loading import load_tokenizer, model_path
from kdrl_lightning.module import KDRLModule
from kdrl_lightning.teachers.cross_tokenizer.teacher import (
    CrossTokenizerTeacher,
    same_vocabulary,
)
from kdrl_lightning.teachers.local import LocalTeacher
from kdrl_lightning.teachers.own_prompt.contexts import Context, FixedContext, RowContext
from kdrl_lightning.teachers.own_prompt.prompt import PLACES, TeacherPrompt
from kdrl_lightning.teachers.own_prompt.teacher import PromptedTeacher
from kdrl_lightning.teachers.self_teachers.found import self_teachers, walk

# Assumed characters per token if the tokenizer is not available; most have more.
CHARACTERS = 3
# Assumed tokens of the teacher per token of the student if a tokenizer is not available: about the
# most for mathematics with one token per digit.
OTHER_TOKENS = 1.25
SAMPLE = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in "
    "May. How many clips did Natalia sell altogether in April and May?\nFirst, 48 / 2 = 24, so she "
    "sold 24 clips in May. Altogether 48 + 24 = 72. Let $f(x) = \\frac{x^2 - 3x + 2}{x - 1}$; for "
    "x = 1024.5 we get f(x) = 1022.5. Therefore the answer is \\boxed{72}."
)


@dataclass(frozen=True)
class OwnPrompts:
    """The prompts that a teacher reads instead of the student's.

    Attributes:
        tokens: tokens of the longest prompt.
        differ: whether prompts differ within a group.
        note: assumption behind ``tokens``, for the user; empty if there is none.
        per_token: the teacher's tokens per token of the student.
    """

    tokens: int
    differ: bool = False
    note: str = ""
    per_token: float = 1.0

    def length(self, completion: int) -> int:
        """Return the length of the teacher's row for a completion of this many student tokens."""
        return self.tokens + math.ceil(self.per_token * completion)


def tokens_per_token(module: KDRLModule, job: Job) -> tuple[float | None, str]:
    """Return a teacher's tokens per token of the student, and a note on how we know.

    The number is None if both use the same tokens.
    """
    found = [t for t, _ in walk(module.teacher) if isinstance(t, CrossTokenizerTeacher)]
    if not found or module.objective.divergence is not None:
        return None, ""  # whole distributions can be compared over one vocabulary only
    if job.teacher_tokens is not None:
        return job.teacher_tokens, ""
    theirs = found[0].tokenizer_path
    if theirs is None:
        return None, ""
    paths = model_path(module.student_source), theirs
    if not all(map(_at_hand, paths)):
        return OTHER_TOKENS, (
            f"the teacher's tokenizer makes {OTHER_TOKENS:g} tokens of one of the student's; "
            "`--teacher-tokens` sets it"
        )
    ours, other = map(load_tokenizer, paths)
    if same_vocabulary(ours, other):
        return None, ""
    counts = [len(t(SAMPLE, add_special_tokens=False)["input_ids"]) for t in (ours, other)]
    share = counts[1] / max(1, counts[0])
    return share, f"the teacher's tokenizer makes {share:.2f} tokens of one of the student's"


def _at_hand(path: str) -> bool:
    """Return whether a tokenizer is on this machine, in a folder or the hub's cache."""
    if Path(path).is_dir():
        return any((Path(path) / name).exists() for name in TOKENIZERS)
    try:
        return isinstance(try_to_load_from_cache(path, "tokenizer.json"), str)
    except HFValidationError:  # a folder that does not exist yet
        return False


def own_prompts_of(module: KDRLModule, job: Job, share: float | None) -> OwnPrompts | None:
    """Return the longest prompts that the teacher reads; None if they are the student's.

    Args:
        module: the module with the teacher.
        job: gives the run's lengths.
        share: the teacher's tokens per token of the student; None: its tokens are the student's.
    """
    teachers = [found for found, _ in walk(module.teacher)]
    prompts = [t.prompt for t in teachers if isinstance(t, PromptedTeacher)]
    if not prompts and not any(isinstance(t, CrossTokenizerTeacher) for t in teachers):
        return None
    count = _counter(model_path(module.student_source))
    lengths = [_length(prompt, job, count) for prompt in prompts] or [(job.longest_prompt, "")]
    tokens, note = max(lengths)
    paths = [model_path(t.model) for t in teachers if isinstance(t, LocalTeacher)]
    paths += [model_path(module.student_source)] * bool(self_teachers(module.teacher))
    context = min((_context(path, job) for path in paths), default=None)
    tokens = math.ceil(tokens * (share or 1.0))
    if job.teacher_prompt is not None:
        tokens, note = job.teacher_prompt, ""
    if context is not None:
        room = context - math.ceil(job.rollout.max_tokens * (share or 1.0))
        tokens = min(tokens, max(1, room))
    differ = any(_differs(prompt.context) for prompt in prompts)
    return OwnPrompts(tokens, differ, note, share or 1.0)


def _length(prompt: TeacherPrompt, job: Job, count: Callable[[str], int]) -> tuple[int, str]:
    """Return the tokens of the longest prompt of a template, and a note on assumptions.

    If a prompt would exceed the template's ``max_tokens``, the teacher reads the student's.
    """
    form = (
        prompt.form if isinstance(prompt.form, str) else "".join(m["content"] for m in prompt.form)
    )
    tokens = job.longest_prompt + count(PLACES.sub("", form)) + count(prompt.prefix)
    note = ""
    for part in [] if prompt.context is None else prompt.context.parts():
        if isinstance(part, FixedContext):
            tokens += count(part.text)
        elif not list(part.parts())[1:]:  # a context itself, not a frame around others
            tokens += job.rollout.max_tokens
            if not part.reads_siblings:
                note = (
                    "what the teacher's prompt adds is taken to be as long as a completion; "
                    "`--teacher-prompt-tokens` sets the whole length"
                )
    if prompt.max_tokens is not None and (note or prompt.max_tokens <= tokens):
        return max(prompt.max_tokens, job.longest_prompt), ""
    return tokens, note


def _counter(path: str) -> Callable[[str], int]:
    """Return a function that counts a text's tokens, with a tokenizer or ``CHARACTERS``."""
    if not _at_hand(path):
        return lambda text: math.ceil(len(text) / CHARACTERS)
    tokenizer = load_tokenizer(path)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _differs(context: Context | None) -> bool:
    """Return whether a context differs within a group: it reads completions, not just the row."""
    return context is not None and any(
        not isinstance(part, RowContext) and not list(part.parts())[1:] for part in context.parts()
    )


def _context(path: str, job: Job) -> int:
    config = config_of(path, job.model_configs).get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1 << 40)
