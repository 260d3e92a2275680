"""Whether student and teacher speak one language: vocabulary, end token, chat template.

What makes scores meaningless is refused with the difference named; what only makes them worse is a
warning.
"""

from __future__ import annotations

import warnings
from itertools import takewhile
from typing import Any

from kdrl_lightning.errors import ConfigurationError

PROBES = (
    [{"role": "user", "content": "1+1="}],
    [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1="}],
)


def check_same_vocabulary(student: Any, teacher: Any, student_path: str, teacher_path: str) -> None:
    """Refuse a teacher whose token ids mean something else than the student's.

    Tokens are compared by content, id by id. Tokens that only the teacher has are a warning: the
    student can neither sample them nor be compared on them, but the teacher's own completions may
    hold them. Rows of an embedding matrix that stand for no token do not count.

    Raises:
        ConfigurationError: an id stands for different tokens, or the student has one more.
    """
    ours, theirs = _by_id(student), _by_id(teacher)
    different = sorted(i for i in ours.keys() & theirs.keys() if ours[i] != theirs[i])
    missing, extra = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    if different:
        first = different[0]
        found = f"{len(different)} ids differ, first {first}: {ours[first]!r} against "
        found += repr(theirs[first])
    elif missing:
        first = missing[0]
        found = f"{len(missing)} of the student's ids are unknown, first {first}: {ours[first]!r}"
    else:
        if extra:
            warnings.warn(
                f"the teacher {teacher_path} has {len(extra)} tokens that the student "
                f"{student_path} does not know, first {extra[0]}: {theirs[extra[0]]!r}. They mean "
                "nothing to the student, should the teacher's own completions hold them.",
                stacklevel=2,
            )
        return
    raise ConfigurationError(
        f"student and teacher must share one vocabulary: got {found} "
        f"(student {student_path}, teacher {teacher_path}). Choose a teacher of the same family."
    )


def compare(
    student: Any,
    teacher: Any,
    student_path: str,
    teacher_path: str,
    vocab_size: int,
    ends: tuple[int, int],
) -> str | None:
    """Compare two tokenizers in everything.

    Args:
        student: its tokenizer.
        teacher: its tokenizer.
        student_path: its folder or hub name.
        teacher_path: its folder or hub name.
        vocab_size: rows of the student's embedding.
        ends: the token that each writes when it is done, the student's first.

    Returns:
        Both end tokens in words, where they differ.
    """
    check_same_vocabulary(student, teacher, student_path, teacher_path)
    warn_of_templates(student, teacher, student_path, teacher_path)
    return different_ends(student, teacher, vocab_size, ends)


def different_ends(
    student: Any, teacher: Any, vocab_size: int, ends: tuple[int, int] | None = None
) -> str | None:
    """Return student's and teacher's end token in words if they differ, else None.

    Args:
        student: its tokenizer.
        teacher: its tokenizer.
        vocab_size: rows of the student's embedding.
        ends: the token that each writes when it is done; None: the tokenizers' ``eos_token``.

    Raises:
        ConfigurationError: the teacher's is not among the ``vocab_size`` rows of the student.
    """
    ours, theirs = ends or (student.eos_token_id, teacher.eos_token_id)
    if ours == theirs:
        return None
    names = f"{_by_id(student)[ours]!r} ({ours}) and {_by_id(teacher)[theirs]!r} ({theirs})"
    if theirs >= vocab_size:
        raise ConfigurationError(
            f"the teacher's end token must be among the student's {vocab_size} rows: got {names}. "
            "Choose a teacher of the same family."
        )
    return names


def check_end_tokens(ends: str | None, objective: Any) -> None:
    """Refuse an objective that reads the teacher at an end that the teacher never writes.

    Where a completion ends the student writes its own end token. A teacher that ends with another
    one gives it next to no probability, and would teach the student not to end.

    Args:
        ends: what ``compare`` returned, None also where the teacher translates.
        objective: says whether it reads the teacher there.

    Raises:
        ConfigurationError: it does.
    """
    if ends is None or not objective.needs_teacher or objective.leaves_out_end:
        return
    raise ConfigurationError(
        f"student and teacher must end with the same token: got {ends}. Set "
        "`translate_end_token: true` of a LocalTeacher, which reads its own end as the student's, "
        "or leave the end out of the teacher's term with the selection ExceptEndToken."
    )


def warn_of_templates(student: Any, teacher: Any, student_path: str, teacher_path: str) -> None:
    """Warn where the teacher's chat template renders a conversation in another way.

    The teacher reads the student's prompts, token by token. One that was trained with another
    template scores them worse, without any error.
    """
    for messages in PROBES:
        ours, theirs = _render(student, messages), _render(teacher, messages)
        if ours != theirs:
            same = takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
            at = len(list(same))
            warnings.warn(
                f"the chat templates of student {student_path} and teacher {teacher_path} differ, "
                f"first at character {at} of {len(messages)} rendered messages: "
                f"{_excerpt(ours, at)} against {_excerpt(theirs, at)}. The teacher scores the "
                "student's prompts: give the student's tokenizer the template that the teacher was "
                "trained with, unless prompts are plain text for both.",
                stacklevel=2,
            )
            return


def _by_id(tokenizer: Any) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """Return the prompt as text; in angle brackets why there is none."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        return "<no template>"
    try:
        return str(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        )
    except TemplateError as error:
        return f"<refused: {error}>"


def _excerpt(text: str, at: int) -> str:
    """Return a few characters on both sides of a position."""
    start, end = max(at - 12, 0), at + 24
    return repr("..." * (start > 0) + text[start:end] + "..." * (end < len(text)))
