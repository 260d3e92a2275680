"""Finds the self-teachers of a run, also inside other teachers, and checks them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TypeVar

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.self_teachers.adapter_off import AdapterOffTeacher
from kdrl_lightning.teachers.self_teachers.teacher import SelfTeacher

# The module's attribute that holds kept weights; names in checkpoints begin with it.
KEPT = "self_teachers"
Value = TypeVar("Value")


def walk(teacher: Teacher | None, own_prompt: bool = False) -> Iterator[tuple[Teacher, bool]]:
    """Yield a teacher and all that it wraps, each with whether it reads its own prompt.

    Args:
        teacher: a teacher; a wrapper has the wrapped one in ``teacher``, several in ``teachers``.
        own_prompt: a wrapper around it gives it a different prompt from the student's.
    """
    if teacher is None:
        return
    prompted = own_prompt or teacher.has_own_prompt
    yield teacher, prompted
    wrapped = getattr(teacher, "teacher", None)  # only wrappers have these two
    several = getattr(teacher, "teachers", {}).values()
    for inner in (wrapped, *several):
        yield from walk(inner, prompted)


def self_teachers(teacher: Teacher | None) -> list[SelfTeacher]:
    """Return the self-teachers among a teacher and those that it wraps."""
    return [found for found, _ in walk(teacher) if isinstance(found, SelfTeacher)]


def kinds_of_self(teacher: Teacher | None) -> list[str]:
    """Return the class name of each self-teacher's rule, and of each ``AdapterOffTeacher``."""
    names = []
    for found, _ in walk(teacher):
        if isinstance(found, SelfTeacher):
            names.append(type(found.rule).__name__)
        elif isinstance(found, AdapterOffTeacher):
            names.append(AdapterOffTeacher.__name__)
    return names


def check_self_teachers(teacher: Teacher | None) -> None:
    """Check that each self-teacher can differ from the student; warn if its rate prevents that.

    Raises:
        ConfigurationError: a teacher with the current weights reads the student's prompt.
    """
    for found, own_prompt in walk(teacher):
        if own_prompt or not isinstance(found, SelfTeacher) or not found.rule.is_student:
            continue
        rule = type(found.rule).__name__
        if rule == "LiveWeights":
            raise ConfigurationError(
                "`weights` must not be LiveWeights for a teacher that reads the student's prompt: "
                "got SelfTeacher, whose distribution is then the student's, so that its KL is 0 "
                "and teaches nothing. Give it its own prompt, or use MovingAverage."
            )
        warnings.warn(
            f"SelfTeacher with {rule} has the student's weights in each rollout and reads its "
            "prompt, so that its KL is 0 and teaches nothing. Give it its own prompt, or change "
            "the rate.",
            stacklevel=2,
        )


def drop_kept(state: Mapping[str, Value]) -> dict[str, Value]:
    """Return a module's state without the weights of self-teachers, which only training needs."""
    return {name: value for name, value in state.items() if not name.startswith(f"{KEPT}.")}
