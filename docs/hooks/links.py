"""Site hook: links that work in the repository also work on the site.

The README is the site's first page. A link to a file outside ``docs/`` is
replaced by the file's path.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
HOME = "index.md"
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.M | re.S)
CODE_OR_PAIR = re.compile(r"(`+[^`]*`+)|\] \[")
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README as the first page."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, HOME, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page."""
    uri = page.file.src_uri
    return relinked(markdown, "README.md" if uri == HOME else f"docs/{uri}", uri)


def relinked(text: str, source: str, page: str) -> str:
    """Return Markdown whose links work on the site.

    Args:
        text: Markdown, with links relative to ``source``.
        source: the file's path in the repository.
        page: the page's path on the site.
    """

    def replaced(match: re.Match[str]) -> str:
        label, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        name, _, anchor = target.partition("#")
        path = normpath(str(PurePosixPath(source).parent / name))
        if (ROOT / path / "README.md").is_file():
            path += "/README.md"
        if path == "README.md":
            path = f"docs/{HOME}"
        if path.startswith("docs/"):
            target = relpath(path, str(PurePosixPath("docs", page).parent))
            return f"[{label}]({target}{'#' * bool(anchor)}{anchor})"
        if not (ROOT / path).exists():
            return match[0]  # mkdocs reports it
        plain = label.strip("`")
        return f"`{path}`" if path.endswith(plain) else f"{label} (`{path}`)"

    # Every second piece is a fenced block.
    pieces = FENCE.split(text)
    pieces[::2] = [LINK.sub(replaced, unpaired(piece)) for piece in pieces[::2]]
    return "".join(pieces)


def unpaired(text: str) -> str:
    """Return Markdown in which ``[0, 1] [R]`` stays plain text, as on GitHub."""
    return CODE_OR_PAIR.sub(lambda match: match[1] or "] \\[", text)
