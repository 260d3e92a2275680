"""Why vLLM did not start, in one line with the cure."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from kdrl_lightning.engines.vllm.errors import missing_package, reason_and_cure, short

NEEDS = "its code for this architecture needs the package {}, which is not installed"
INSTALL = "Install {} in the version that fits your torch"


def raised(*errors: Exception) -> Exception:
    """Return the last of errors, each raised from the one before."""
    for cause, error in pairwise(errors):
        error.__cause__ = cause
    return errors[-1]


@pytest.mark.parametrize(
    ("error", "package"),
    [
        (ModuleNotFoundError("No module named 'no_vision'", name="no_vision"), "no_vision"),
        (ModuleNotFoundError("No module named 'no_a.b'", name="no_a.b"), "no_a"),
        # transformers' lazy imports name a class; vLLM repeats the text of other errors.
        (
            raised(
                ModuleNotFoundError("No module named 'no_vision'", name="no_vision"),
                ModuleNotFoundError("Could not import module 'Gemma4Processor'."),
            ),
            "no_vision",
        ),
        (ValueError("No module named 'no_vision', which its processor needs."), "no_vision"),
        (ImportError("cannot import name 'x' from 'torch'", name="torch"), ""),  # installed
        (AttributeError("no attribute 'y'", name="no_vision"), ""),
        (ValueError("not enough memory"), ""),
    ],
)
def test_the_package_that_is_missing(error: Exception, package: str) -> None:
    assert missing_package(error) == package
    if package:
        found = reason_and_cure(error, lambda architecture: None)
        assert found == (NEEDS.format(package), INSTALL.format(package))


def test_what_vllm_leaves_in_its_log_is_found() -> None:
    asked: list[str] = []

    def import_error(architecture: str) -> Exception:
        asked.append(architecture)
        return ModuleNotFoundError("No module named 'no_vision'", name="no_vision")

    text = "Model architectures ['Qwen3_5ForCausalLM'] failed to be inspected. Please check"
    assert reason_and_cure(ValueError(text), import_error)[0] == NEEDS.format("no_vision")
    assert asked == ["Qwen3_5ForCausalLM"]


def test_a_class_that_can_be_imported_keeps_vllms_words() -> None:
    text = "Model architectures ['A'] failed to be inspected. Check the logs."
    found = reason_and_cure(ValueError(text), lambda architecture: None)
    assert found == (text[:-1], "Check vLLM's versions and memory")


def test_long_and_nested_messages_are_one_line() -> None:
    class PydanticError(ValueError):
        def errors(self) -> list[dict[str, Any]]:
            return [{"msg": "Value error, a\n  rule"}, {"msg": "another"}]

    assert short(PydanticError("many lines")) == "a rule; another"
    assert short(ValueError("x" * 400)) == "x" * 300 + "..."
    assert short(AssertionError()) == "AssertionError"
