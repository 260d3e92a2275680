"""Comparison of the student's and the teacher's tokenizers: vocabulary, end token, chat template.

A difference that makes the teacher's scores meaningless raises an error; one that only makes them
worse gives a warning.
"""

from __future__ import annotations

import json
import warnings
from itertools import takewhile
from typing import Any

from kdrl_lightning.common.chat_templates import render
from kdrl_lightning.common.untyped import HFTokenizer, Tree
from kdrl_lightning.errors import ConfigurationError

# `Any`: an objective; `teachers` must not import `objectives`.

PROBES = (
    [{"role": "user", "content": "1+1="}],
    [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1="}],
)


def check_same_vocabulary(
    student: HFTokenizer, teacher: HFTokenizer, student_path: str, teacher_path: str
) -> None:
    """Refuse a teacher whose token ids have other meanings than the student's.

    Tokens are compared by content, id by id. Tokens that only the teacher has give a warning: the
    student cannot sample them and is not compared on them, but completions that the teacher
    generates may contain them. Padding rows of an embedding do not count.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's tokenizer.
        student_path: folder or hub name of the student, for messages.
        teacher_path: folder or hub name of the teacher, for messages.

    Raises:
        ConfigurationError: an id has two meanings, or the student has a token that the teacher
            lacks.
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
        found = f"{len(missing)} ids that only the student has, first {first}: {ours[first]!r}"
    else:
        if extra:
            warnings.warn(
                f"the teacher {teacher_path} has {len(extra)} tokens that the student "
                f"{student_path} does not know, first {extra[0]}: {theirs[extra[0]]!r}. "
                "In completions that the teacher generates, they mean nothing to the student.",
                stacklevel=2,
            )
        return
    raise ConfigurationError(
        f"student and teacher must share one vocabulary: got {found} "
        f"(student {student_path}, teacher {teacher_path}). Choose a teacher of the same family."
    )


def compare(
    student: HFTokenizer,
    teacher: HFTokenizer,
    student_path: str,
    teacher_path: str,
    vocab_size: int,
    ends: tuple[int, int],
) -> str | None:
    """Compare vocabularies, chat templates and end tokens; return both end tokens if they differ.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's tokenizer.
        student_path: folder or hub name of the student, for messages.
        teacher_path: folder or hub name of the teacher, for messages.
        vocab_size: rows of the student's embedding.
        ends: the tokens with which student and teacher end a completion.

    Returns:
        Both end tokens in words if they differ, else None.

    Raises:
        ConfigurationError: vocabularies differ, or the student has no row for the teacher's end
            token.
    """
    check_same_vocabulary(student, teacher, student_path, teacher_path)
    warn_of_merges(student, teacher, student_path, teacher_path)
    warn_of_templates(student, teacher, student_path, teacher_path)
    return different_ends(student, teacher, vocab_size, ends)


def different_ends(
    student: HFTokenizer, teacher: HFTokenizer, vocab_size: int, ends: tuple[int, int] | None = None
) -> str | None:
    """Return student's and teacher's end token in words if they differ, else None.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's tokenizer.
        vocab_size: rows of the student's embedding.
        ends: the tokens with which student and teacher end a completion; None: the ``eos_token`` of
            each tokenizer.

    Raises:
        ConfigurationError: the teacher's end token is ``vocab_size`` or higher.
    """
    ours, theirs = ends or (student.eos_token_id, teacher.eos_token_id)
    if ours == theirs:
        return None
    names = f"{_by_id(student)[ours]!r} ({ours}) and {_by_id(teacher)[theirs]!r} ({theirs})"
    if theirs >= vocab_size:
        raise ConfigurationError(
            f"the teacher's end token must be below {vocab_size}, the rows of the student's "
            f"embedding: got {names}. Choose a teacher of the same family."
        )
    return names


def check_end_tokens(ends: str | None, objective: Any) -> None:
    """Refuse an objective that would teach the student never to end.

    The student closes a completion with its end token. A teacher with another end token gives that
    token almost no probability, so a teacher term on it teaches the student not to end.

    Args:
        ends: what ``compare`` returned; None also if the teacher translates end tokens.
        objective: the loss.

    Raises:
        ConfigurationError: end tokens differ, and the loss reads the teacher's score of them.
    """
    if ends is None or not objective.needs_teacher or objective.leaves_out_end:
        return
    cure = "or leave end tokens out of the teacher's term with the selection ExceptEndToken."
    if objective.divergence is not None or objective.top_k or objective.teacher_top_k:
        cure = "because the objective compares the end token's probability at every position."
    raise ConfigurationError(
        f"student and teacher must end with the same token: got {ends}. Set "
        "`translate_end_token: true` of a LocalTeacher, which swaps the two tokens in its scores, "
        f"{cure}"
    )


def check_sampled(objective: Any) -> None:
    """Refuse an objective that compares more than sampled tokens, if the tokenizers differ.

    Args:
        objective: the loss.

    Raises:
        ConfigurationError: it compares the full vocabulary, or a model's most likely tokens.
    """
    if objective.divergence is None and not objective.top_k and not objective.teacher_top_k:
        return
    what = "distributions over the full vocabulary"
    if objective.top_k:
        what = f"the student's {objective.top_k} most likely tokens"
    elif objective.teacher_top_k:
        what = f"the teacher's {objective.teacher_top_k} most likely tokens"
    raise ConfigurationError(
        "`objective` must compare sampled tokens with a teacher of another tokenizer: got "
        f"{type(objective).__name__}, which compares {what}. The tokens of the two vocabularies "
        "differ: use `kl_estimator` k2, k3 or policy_gradient, or RLAD."
    )


def warn_of_templates(
    student: HFTokenizer, teacher: HFTokenizer, student_path: str, teacher_path: str
) -> None:
    """Warn if the teacher's chat template renders a conversation differently.

    The teacher reads the student's prompts token by token. If it was trained with another template,
    its scores get worse without any error.
    """
    for messages in PROBES:
        ours, theirs = _render(student, messages), _render(teacher, messages)
        if ours != theirs:
            same = takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
            at = len(list(same))
            warnings.warn(
                f"the chat templates of student {student_path} and teacher {teacher_path} differ, "
                f"first at character {at} of {len(messages)} rendered messages: "
                f"{_excerpt(ours, at)} against {_excerpt(theirs, at)}. The teacher scores prompts "
                "as the student's template renders them. Give the student's tokenizer the template "
                "that the teacher was trained with, unless all prompts are plain text.",
                stacklevel=2,
            )
            return


def warn_of_merges(
    student: HFTokenizer, teacher: HFTokenizer, student_path: str, teacher_path: str
) -> None:
    """Warn if the teacher's tokenizer would split a text into other tokens of the same vocabulary.

    The teacher was trained on its own splits. On others its scores get worse without any error.
    """
    if not same_rules(student, teacher, ("model",)):
        warnings.warn(
            f"the tokenizers of student {student_path} and teacher {teacher_path} have one "
            "vocabulary and different merges or scores: the teacher would split a text otherwise "
            "than the tokens that it scores. Wrap it in a CrossTokenizerTeacher.",
            stacklevel=2,
        )


def same_rules(
    one: HFTokenizer,
    other: HFTokenizer,
    steps: tuple[str, ...] = ("model", "normalizer", "pre_tokenizer"),
) -> bool:
    """Return whether two tokenizers of one vocabulary split texts alike, as far as we can tell.

    Args:
        one: a tokenizer.
        other: another one. A tokenizer without a ``tokenizers`` backend cannot be compared and
            counts as alike.
        steps: the steps of the backend to compare.
    """
    rules = [_rules(tokenizer, steps) for tokenizer in (one, other)]
    return None in rules or rules[0] == rules[1]


def _rules(tokenizer: HFTokenizer, steps: tuple[str, ...]) -> Tree | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    spec = json.loads(backend.to_str())
    if isinstance(spec["model"].get("vocab"), dict):  # else it holds the scores of Unigram
        del spec["model"]["vocab"]
    return {step: spec[step] for step in steps}


def _by_id(tokenizer: HFTokenizer) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _render(tokenizer: HFTokenizer, messages: list[dict[str, str]]) -> str:
    """Return the rendered prompt, or in angle brackets the reason why there is none."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        return "<no template>"
    try:
        return render(tokenizer, messages, add_generation_prompt=True)
    except TemplateError as error:
        return f"<refused: {error}>"


def _excerpt(text: str, at: int) -> str:
    """Return a few characters on both sides of a position."""
    start, end = max(at - 12, 0), at + 24
    return repr("..." * (start > 0) + text[start:end] + "..." * (end < len(text)))
