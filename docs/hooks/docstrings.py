"""Griffe extension of the site: report missing docstrings, and show doctests as code."""

from __future__ import annotations

import logging
import re

import griffe

LOG = logging.getLogger("mkdocs.plugins.docstrings")
DOCTEST = re.compile(r"^>>> .*?(?=\n\s*\n|\Z)", re.M | re.S)


class Docstrings(griffe.Extension):
    """Runs on every object of the package before its page is made."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Warn if a public class or function has no docstring: a strict build then fails."""
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)
        elif (obj.is_class or obj.is_function) and is_public(obj):
            LOG.warning("%s:%s: `%s` has no docstring", obj.filepath, obj.lineno, obj.path)


def is_public(obj: griffe.Object) -> bool:
    """Tell whether no part of an object's path is private."""
    return not any(part.startswith("_") for part in obj.path.split("."))


def fenced(docstring: str) -> str:
    """Return a docstring whose doctests are fenced blocks."""
    docstring = re.sub(r"::$", ":", docstring, flags=re.M)
    return DOCTEST.sub(lambda match: f"```pycon\n{match[0]}\n```", docstring)
