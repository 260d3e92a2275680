"""Site hook: a page with a wide table also gets the room of the table of contents."""

from __future__ import annotations

import re

from mkdocs.structure.pages import Page

WIDE = 7  # columns
HEAD = re.compile(rf"^\|(?:\s*:?-+:?\s*\|){{{WIDE},}}\s*$", re.M)


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Hide the table of contents, which is next to the text."""
    if HEAD.search(markdown):
        page.meta.setdefault("hide", []).append("toc")
    return markdown
