"""If vLLM does not start, one line says why and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from kdrl_lightning.engines.vllm.errors import (
    described,
    failure,
    missing_package,
    reason_and_cure,
    short,
)
from kdrl_lightning.errors import ConfigurationError, TrainingStopped

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
    assert found == (f"ValueError: {text[:-1]}", "Check vLLM's versions and memory")


def test_long_and_nested_messages_are_one_line() -> None:
    class PydanticError(ValueError):
        def errors(self) -> list[dict[str, Any]]:
            return [{"msg": "Value error, a\n  rule"}, {"msg": "another"}]

    assert short(PydanticError("many lines")) == "a rule; another"
    assert short(ValueError("x" * 400)) == "x" * 300 + "..."
    assert short(AssertionError()) == "AssertionError"


def refuses(kind: type[Exception]) -> None:
    raise kind("heads of 48 are not supported..")


def has_no_words(values: list[int]) -> int:
    return next(iter(values))


def looks_up(classes: dict[str, int]) -> int:
    return classes["vllm"]


def calls_torch(states: torch.Tensor) -> torch.Tensor:
    return states.view(-1, 2, 32)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: refuses(NotImplementedError), r"heads of 48 are not supported"),
        (
            lambda: has_no_words([]),
            r"StopIteration, at `return next\(iter\(values\)\)` \(test_vllm_errors\.py:\d+\)",
        ),
        (lambda: looks_up({}), r"KeyError: 'vllm', at `return classes\[\"vllm\"\]` \(.*:\d+\)"),
        (
            lambda: calls_torch(torch.zeros(3)),
            r"RuntimeError: shape .* is invalid .*, at `return states\.view\(-1, 2, 32\)` \(.*\)",
        ),
        # The caller's line says more than torch's.
        (
            lambda: torch.nn.Linear(2, 2)(torch.zeros(3)),
            r"RuntimeError: .*, at `lambda: torch\.nn\.Linear\(2, 2\).*` \(.*test_vllm_errors.*\)",
        ),
    ],
)
def test_an_error_that_code_did_not_raise_on_purpose_says_where_it_was(
    call: Callable[[], Any], words: str
) -> None:
    with pytest.raises(Exception) as error:
        call()
    assert re.fullmatch(words, described(error.value))


def test_the_long_list_of_architectures_is_left_out() -> None:
    text = "Model architectures ['A'] are not supported for now. Supported architectures: dict"
    with pytest.raises(ValueError, match="are not") as error:
        raise ValueError(text)
    assert described(error.value) == "Model architectures ['A'] are not supported for now"


@pytest.mark.parametrize("what", ["start", "take the weights", "sample"])
def test_an_engine_that_never_sampled_is_the_wrong_one_and_another_broke(what: str) -> None:
    error = ValueError("no such kernel")
    first, later = (
        failure(error, what, "a/model", sampled, lambda _: None) for sampled in (False, True)
    )
    assert isinstance(first, ConfigurationError) and isinstance(later, TrainingStopped)
    assert str(first) == (
        "`rollout_engine` must be an engine that can run a/model: got VLLMEngine, which could not "
        f"{what}: ValueError: no such kernel. Check vLLM's versions and memory, or use "
        "TransformersEngine."
    )
    assert str(later) == (
        f"vLLM could not {what}: ValueError: no such kernel. Resume the run from its last "
        "checkpoint."
    )
