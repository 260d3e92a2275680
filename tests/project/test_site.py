"""The documentation site: links, formulas, docstrings and the pages of the reference."""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("mkdocs", reason="pip install '.[docs]'")
griffe = pytest.importorskip("griffe", reason="pip install '.[docs]'")
pytest.importorskip("latex2mathml", reason="pip install '.[docs]'")

ROOT = Path(__file__).parents[2]
ROOM = '''
"""A room."""
from os import sep


def said():
    """Yes."""


def silent(): ...


def _private(): ...


class Shown:
    """Yes."""

    def method(self): ...
'''


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"hooks_{name}", ROOT / f"docs/hooks/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


links, formulas, docstrings, reference = map(hook, ("links", "formulas", "docstrings", "reference"))


@pytest.mark.parametrize(
    ("text", "source", "page", "expected"),
    [
        ("[a](docs/vllm.md#one)", "README.md", "index.md", "[a](vllm.md#one)"),
        ("![a](docs/samples.png)", "README.md", "index.md", "![a](samples.png)"),
        ("[a](docs/methods)", "README.md", "index.md", "[a](methods/README.md)"),
        ("[a](../statistics.md)", "docs/methods/rlad.md", "methods/rlad.md", None),
        ("[a](../../README.md#pages)", "docs/methods/rlad.md", "methods/rlad.md", "../index.md"),
        ("[a](#here) [b](https://x.org/y)", "docs/vllm.md", "vllm.md", None),
        ("[a](missing.md) [b](../missing.py)", "docs/vllm.md", "vllm.md", None),
        ("in [0, 1] [R], `a[0] [1]`", "docs/a.md", "a.md", "in [0, 1] \\[R], `a[0] [1]`"),
        (
            "[main](../kdrl_lightning/module.py)",
            "docs/a.md",
            "a.md",
            "main (`kdrl_lightning/module.py`)",
        ),
        (
            "[`module.py`](../kdrl_lightning/module.py)",
            "docs/a.md",
            "a.md",
            "`kdrl_lightning/module.py`",
        ),
        ("```\n[a](docs/vllm.md)\n```", "README.md", "index.md", None),
        ("- x\n  ```\n  [a](docs/vllm.md)\n  ```", "README.md", "index.md", None),
    ],
)
def test_links(text: str, source: str, page: str, expected: str | None) -> None:
    found = links.relinked(text, source, page)
    if expected is not None and expected.startswith("../"):
        expected = f"[a]({expected}#pages)"
    assert found == (text if expected is None else expected)


def test_formulas_become_mathml() -> None:
    text = r'<p><span class="arithmatex">\(a &lt; \pi_T\)</span></p>'
    page = type("Page", (), {"file": type("File", (), {"src_uri": "a.md"})})
    found = formulas.on_page_content(text, page)
    assert found.startswith('<p><math xmlns="http://www.w3.org/1998/Math/MathML" display="inline">')
    assert "<mo>&lt;</mo>" in found.replace("&#x0003C;", "&lt;")
    assert "<msub><mi>&#x003C0;</mi><mi>T</mi></msub>" in found and "arithmatex" not in found
    block = '<div class="arithmatex">\\[\n\\Bigl( a \\Bigr)^2 \\log x\n\\]</div>'
    found = formulas.on_page_content(block, page)
    assert found.startswith('<div class="formula"><math') and 'display="block"' in found
    assert found.count('stretchy="true"') == 2 and "<mi>log</mi><mspace" in found


def test_an_unknown_command_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mkdocs.plugins.formulas"):
        formulas.rendered(r"\nosuchthing x", block=False, page="a.md")
    assert "a.md: no MathML for \\nosuchthing in the formula" in caplog.text


def test_every_formula_of_the_pages_is_known(caplog: pytest.LogCaptureFixture) -> None:
    count = 0
    for page in sorted((ROOT / "docs/methods").glob("*.md")):
        for piece in page.read_text().split("$$")[1::2]:
            formulas.rendered(piece, block=True, page=page.name)
            count += 1
    assert count >= 17 and not caplog.records


def test_doctests_are_fenced() -> None:
    text = "First.\n\n>>> f(1)\n2\n\nLast::\n\n    code"
    expected = "First.\n\n```pycon\n>>> f(1)\n2\n```\n\nLast:\n\n    code"
    assert docstrings.fenced(text) == expected


def test_a_missing_docstring_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "room.py").write_text(ROOM)
    extensions = griffe.load_extensions(docstrings.Docstrings())
    module = griffe.load("room", search_paths=[tmp_path], extensions=extensions)
    reported = [record.getMessage().split(": ", 1)[1] for record in caplog.records]
    assert sorted(reported) == [
        "`room.Shown.method` has no docstring",
        "`room.silent` has no docstring",
    ]
    assert reference.public_names(module) == ["said", "silent", "Shown"]


def test_the_reference_shows_every_public_name_once() -> None:
    import kdrl_lightning

    package = griffe.load("kdrl_lightning", search_paths=[ROOT])
    names = reference.names_page(package)
    for name in kdrl_lightning.__all__:
        if name != "__version__":
            assert names.count(f"| [`{name}`][") == 1, name
    assert "::: kdrl_lightning.module.KDRLModule\n" in names
    assert "::: kdrl_lightning.objectives.rlad.RLAD\n" not in names  # on its room's page
    for page, (title, modules) in reference.ROOMS.items():
        text = reference.room_page(package, title, modules)
        assert text.count("\n::: ") >= 3, page
    objectives = reference.room_page(package, *reference.ROOMS["objectives"])
    assert "::: kdrl_lightning.objectives.RLAD\n" in objectives


@pytest.mark.parametrize(("columns", "hidden"), [(6, False), (7, True), (12, True)])
def test_a_wide_table_hides_the_contents(columns: int, hidden: bool) -> None:
    page = type("Page", (), {"meta": {}})
    text = f"# A\n\n{'| a ' * columns}|\n{'| --: ' * columns}|\n{'| 1 ' * columns}|\n"
    assert hook("layout").on_page_markdown(text, page) == text
    assert page.meta == ({"hide": ["toc"]} if hidden else {})


def test_cells_keep_the_table_whole() -> None:
    assert reference.escaped("a | ``b | c``") == "a \\| ``b | c``"


def test_the_command_line_page_lists_every_subcommand() -> None:
    text = (ROOT / "docs/reference/cli.md").read_text()
    for name in ("fit", "validate", "test", "predict", "export", "evaluate", "serve", "configs"):
        assert f"| `{name}` |" in text


def test_the_site_is_strict_and_ci_builds_it() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert "\nstrict: true\n" in text
    for rule in ("omitted_files", "not_found", "anchors", "unrecognized_links"):
        assert f"{rule}: warn" in text
    command = re.search(r"^.*/mkdocs build.*$", (ROOT / ".ci/run").read_text(), re.M)
    assert command is not None
    # Quiet, mkdocs drops warnings before its strict mode counts them.
    assert "-q" not in command[0]
