"""Site hook: LaTeX formulas become MathML while the site is built.

Browsers draw MathML themselves, so a page loads no script and no font for its formulas.
"""

from __future__ import annotations

import html
import logging
import re

from latex2mathml.converter import convert
from mkdocs.structure.pages import Page

LOG = logging.getLogger("mkdocs.plugins.formulas")
# What pymdownx.arithmatex leaves with `generic: true`.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.S)


FENCE = re.compile(r"\\[bB]igg?([lr])(?![a-zA-Z])")
FUNCTION = re.compile(r"(<mi>(?:log|ln)</mi>)(?=<m(?:i|sub|row|over)\b)")


def on_page_content(html: str, page: Page, **_: object) -> str:
    """Replace the formulas of a page."""
    return FORMULA.sub(lambda m: rendered(m[2], m[1] == "div", page.file.src_uri), html)


def rendered(latex: str, block: bool, page: str = "") -> str:
    """Return a formula as MathML; warn if a command is unknown, which fails a strict build."""
    latex = html.unescape(latex).strip()
    mode = "block" if block else "inline"
    # Browsers stretch paired fences to their content; sizes set by hand would differ in a pair.
    paired = FENCE.sub(lambda m: "\\left" if m[1] == "l" else "\\right", latex)
    out = FUNCTION.sub(r'\1<mspace width="0.17em"/>', convert(paired, display=mode))
    unknown = re.findall(r"\\[a-zA-Z]+", html.unescape(out))
    if unknown:
        LOG.warning("%s: no MathML for %s in the formula %s", page, unknown[0], latex)
    return f'<div class="formula">{out}</div>' if block else out
