"""The samples page: text is escaped, it needs no network, and a browser opens it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from helpers.short_runs import fit, make_data, make_module
from kdrl_lightning import EvalSet, Sample, Verdict
from kdrl_lightning.callbacks import SamplePage
from kdrl_lightning.callbacks.reports import (
    SampleView,
    Section,
    TokenView,
    log_samples,
    render,
    visible,
)
from kdrl_lightning.callbacks.reports.loggers import as_markdown
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.tiny import ColumnAddition

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NASTY = (
    "<script>document.title='owned'</script>",
    "</bdi></article><img src=x onerror=\"document.title='owned'\">",
    "\" data-n='x' onmouseover=alert(1)",
    "a\x00b\u202egnp.exe\u2066 👩‍🚀 &amp; &lt; '\"\n\n  # heading\ttab",
    "]]> --> </style> ${x} `code`",
)


def page() -> str:
    tokens = [TokenView(t, -0.5, -4.0, -0.7, "punished", True, True) for t in (*NASTY, "")]
    nasty = "".join(NASTY)
    scored = SampleView(nasty, nasty, nasty, 0.25, False, True, {nasty: 1.0}, tokens)
    plain = SampleView("t", nasty, nasty, 1.0, True, False)
    section = Section(nasty, {nasty: nasty}, {nasty: [scored, plain]})
    return render(nasty, [section, section])


class Read(HTMLParser):
    """Collects elements and the text of the completions."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.completions: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "div":
            self._inside = ("class", "completion") in attrs
            self.completions += [""] * self._inside

    def handle_endtag(self, tag: str) -> None:
        self._inside &= tag != "div"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.completions[-1] += data


def check(read: Read) -> None:
    """Nothing of a model is anything but text."""
    allowed = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "div", "p", "b", "sub"}
    allowed |= {"span", "ul", "li", "details", "summary", "article", "header", "bdi"}
    assert set(read.tags) == allowed
    names = {name for name, _ in read.attributes}
    assert names == {"lang", "charset", "http-equiv", "content", "name", "class", "data-n", "open"}
    nasty = visible("".join(NASTY))
    assert read.completions == [nasty + "·", nasty] * 2


def test_text_of_models_is_escaped_everywhere() -> None:
    text = page()
    check(Read(text))
    assert "\x00" not in text and "\u202e" not in text and "http:" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_opens_it(tmp_path: Path) -> None:
    (tmp_path / "samples.html").write_text(page(), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom"]
    out = subprocess.run(
        [
            str(CHROMIUM),
            *flags,
            f"--user-data-dir={tmp_path}/profile",
            f"file://{tmp_path}/samples.html",
        ],
        capture_output=True,
        timeout=120,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert out.returncode == 0, out.stderr[-2000:]
    dom = out.stdout.decode()
    check(Read(dom))
    assert "<title>owned" not in dom and dom.count("<article>") == 4


def reward(sample: Sample) -> Verdict:
    """Mixed groups under a random model."""
    odd = len(sample.ids) % 2
    return Verdict(odd + 0.5, bool(odd), {"odd": odd, "form": 0.5})


def test_a_run_leaves_a_page_and_says_what_is_scored(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    texts: list[tuple[str, str, int]] = []
    logger = TensorBoardLogger(tmp_path, name="", version="")
    logger.experiment.add_text = lambda *args: texts.append(args)  # type: ignore[method-assign]
    sets = {"near": EvalSet(ColumnAddition(3, seed=2)), "far": EvalSet(ColumnAddition(3, seed=3))}
    callback = SamplePage(completions=2, moments=2, max_tokens=4)
    module = make_module(student_folder, teacher_folder)
    data = make_data(val_prompts=sets, reward=reward, max_tokens=24)
    fit(
        tmp_path,
        module,
        data,
        [callback],
        max_steps=10,
        num_sanity_val_steps=-1,
        logger=logger,
        log_every_n_steps=1,
    )
    titles = [section.title for section in callback.sections]
    # Validations after 4 and 8 steps, and the end after 10; two of them stay.
    assert titles == ["after 10 optimizer steps", "after 8 optimizer steps"]
    groups = callback.sections[1].groups
    assert list(groups) == ["rollout 3", "validation on near", "validation on far"]
    assert list(callback.sections[0].groups) == ["rollout 4"]
    right, wrong = groups["rollout 3"]
    assert right.correct and not wrong.correct and right.parts["odd"] == 1.0
    assert any(token.fate for token in right.tokens)
    text = (tmp_path / "samples.html").read_text()
    assert "the teacher has not scored them" in text and "more tokens" in text
    assert {tag for tag, _, _ in texts} >= {"samples/rollout_3", "samples/validation_on_far"}
    assert {step for _, _, step in texts} == {0, 4, 8, 10}


def test_a_run_without_teacher_or_validation_shows_its_rollout(
    tmp_path: Path, student_folder: str
) -> None:
    from kdrl_lightning import GRPO

    callback = SamplePage(completions=1)
    module = make_module(student_folder, None, GRPO())
    fit(tmp_path, module, make_data(val_prompts=None, max_tokens=24), [callback], max_steps=2)
    (section,) = callback.sections
    assert list(section.groups) == ["rollout 0"]
    assert "log π_T" not in re.sub(r"<p>.*?</p>", "", (tmp_path / "samples.html").read_text())


def test_nothing_is_written_where_nothing_is_wanted(tmp_path: Path, student_folder: str) -> None:
    from kdrl_lightning import GRPO

    for callback, flags in ((SamplePage(completions=0), {}), (SamplePage(), {"fast_dev_run": 1})):
        module = make_module(student_folder, None, GRPO())
        fit(tmp_path, module, make_data(max_tokens=24), [callback], **{"max_steps": 1, **flags})
    assert not (tmp_path / "samples.html").exists()
    for name in ("completions", "moments", "max_tokens"):
        with pytest.raises(ConfigurationError, match=f"`{name}` must be at least"):
            SamplePage(**{name: -1})


def test_wandb_gets_a_table_and_markdown_cannot_be_left() -> None:
    calls: list[dict[str, Any]] = []

    class WandbLogger:
        experiment = object()

        def log_text(self, key: str, **values: Any) -> None:
            calls.append({"key": key, **values})

    token = TokenView("x", -1.0, -0.5, 1.0, "rewarded", True, True)
    sample = SampleView("t", "p", "x\n```\n# y\x0bz", 0.5, True, False, {"a": 1.0}, [token])
    log_samples([WandbLogger()], Section("now", {}, {"rollout 3": [sample]}), 7)
    (call,) = calls
    assert (call["key"], call["step"]) == ("samples/rollout_3", 7)
    assert dict(zip(call["columns"], call["data"][0], strict=True)) == {
        "prompt": "p",
        "completion": "x\n```\n# y\x0bz",
        "reward": 0.5,
        "parts": "{'a': 1.0}",
        "correct": True,
        "teacher_gap": "x(+0.50)",
    }
    assert all(line.startswith("    ") for line in as_markdown([sample]).splitlines())
