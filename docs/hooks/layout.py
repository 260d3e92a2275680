"""Site hook: pages with a wide table have no table of contents, so that the table has room."""

from __future__ import annotations

import re

from mkdocs.structure.pages import Page

WIDE = 7  # columns
HEAD = re.compile(rf"^\|(?:\s*:?-+:?\s*\|){{{WIDE},}}\s*$", re.M)


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Hide the table of contents if the page has a wide table."""
    if HEAD.search(markdown):
        page.meta.setdefault("hide", []).append("toc")
    return markdown
