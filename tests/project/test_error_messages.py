"""Every error message names the rule, the value and the cure, in one line."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "kdrl_lightning"
# Python 3.13 follows the link to the callbacks only if it is asked to.
FILES = sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "callbacks").rglob("*.py")})
# The rule, then the value (`{got}` starts with "got"), then a sentence that says what to do.
FORM = re.compile(r".*\bmust\b.*(\bgot\b|\{got\}).*\S[.:;] \S.*", re.S)
# How those begin that report what happened, or pass on a reason that another message gives.
OTHER_FORMS = (
    "loss or gradient was not finite",
    "another process had to stop",
    "the reward failed on",
    "vLLM could not",
    "row {",  # followed by the error of that row
    "{rule}: {error}",
    "{found}.",
    "{len(skipped)} prompts in a row cannot be used",
    "{bad} of the {drawn} prompts drawn",
    "{message} (see ",
    "`optimizer` must have the checkpoint's {what}.",  # `what` ends with the value
    "{rule}: got",
)


def messages(code: str) -> list[tuple[int, str]]:
    """Return line and text of every error for users whose message is written in place."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
            continue
        if node.func.id in ("ConfigurationError", "TrainingStopped"):
            text = node.args[0]
            if isinstance(text, ast.JoinedStr):
                found.append((node.lineno, "".join(map(_shown, text.values))))
            elif isinstance(text, ast.Constant):
                found.append((node.lineno, str(text.value)))
    return found


def _shown(part: ast.expr) -> str:
    if isinstance(part, ast.FormattedValue):
        return f"{{{ast.unparse(part.value)}}}"
    return str(part.value) if isinstance(part, ast.Constant) else ""


def is_well_formed(text: str) -> bool:
    return "\n" not in text and (text.startswith(OTHER_FORMS) or FORM.fullmatch(text) is not None)


def test_every_error_names_rule_value_and_cure() -> None:
    found = [(path, *m) for path in FILES for m in messages(path.read_text())]
    assert len(found) > 300
    wrong = [f"{path.name}:{line} {text}" for path, line, text in found if not is_well_formed(text)]
    assert not wrong, "\n".join(wrong)


def test_every_other_form_is_still_used() -> None:
    found = [text for path in FILES for _, text in messages(path.read_text())]
    assert not [form for form in OTHER_FORMS if not any(t.startswith(form) for t in found)]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("`{name}` must be above 0: got {value}. Raise it.", True),
        ("`teacher` must return its entropy: {got}. Use a LocalTeacher.", True),
        ("`mode` must be max or min: got {mode}.", False),
        ("`mode` must be max or min. Choose one of them.", False),
        ("`mode` cannot be used: got {mode}. Choose one.", False),
        ("`mode` must be\nmax: got {mode}. Choose one.", False),
    ],
)
def test_what_the_rule_sees(text: str, right: bool) -> None:
    assert is_well_formed(text) == right
