"""Renders samples as one HTML file: no scripts, no external files, light and dark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from kdrl_lightning.callbacks.reports.style import STYLE
from kdrl_lightning.callbacks.reports.text import visible
from kdrl_lightning.callbacks.reports.views import SampleView, TokenView

# Limits between the shades of the teacher's gap, in nats: e^0.1 is 10 % more, e^0.7 a factor of 2,
# e^3 a factor of 20.
EDGES = (0.1, 0.7, 3.0)
FATES = {
    "rewarded": "A > 0: pushed up",
    "dead": "A > 0, but the clip removes its policy gradient",
    "punished": "A < 0: pushed down",
    "protected": "A < 0, but the clip removes its policy gradient",
}


@dataclass(frozen=True)
class Section:
    """Samples to show together, e.g. those of one validation.

    Attributes:
        title: heading of the section.
        notes: remarks by group name.
        groups: samples by group name, e.g. training or validation.
    """

    title: str
    notes: Mapping[str, str]
    groups: Mapping[str, Sequence[SampleView]]


def render(heading: str, sections: Sequence[Section], max_tokens: int = 512) -> str:
    """Return the HTML page, with all text from models and data sets escaped.

    Args:
        heading: heading of the page.
        sections: the page's sections, newest first; the first one is open.
        max_tokens: number of tokens to show of each completion.
    """
    body = "\n".join(_section(s, i == 0, max_tokens) for i, s in enumerate(sections))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{_text(heading)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{_text(heading)}</h1>
{_legend()}
{body}
</body>
</html>
"""


def _legend() -> str:
    low, middle, high = EDGES
    scale = {
        f"below −{high:g}": "n3",
        f"−{high:g} to −{middle:g}": "n2",
        f"−{middle:g} to −{low:g}": "n1",
        "near 0": "",
        f"{low:g} to {middle:g}": "p1",
        f"{middle:g} to {high:g}": "p2",
        f"above {high:g}": "p3",
    }
    shades = " ".join(f'<span class="t {name}"> {text} </span>' for text, name in scale.items())
    words = "".join(
        f'<li><span class="t {name}">{name}</span> {escape(text)}</li>'
        for name, text in FATES.items()
    )
    return f"""<div class="legend">
<p><b>Colour</b>: the teacher's gap d = log&nbsp;π<sub>T</sub> − log&nbsp;π, in nats. Orange: the
teacher finds the token less likely than the student does; blue: more likely.</p>
<p class="scale">{shades}</p>
<p><b>Line below</b>: what the policy loss does with the token.</p>
<ul>{words}</ul>
<p><b>Line above</b>: <span class="t imitated">imitated</span> the teacher enters the token's
gradient. <span class="t unused">Grey</span>: not part of the loss. <span class="t">·</span>: a
token that holds some bytes of a character. <span class="t">Tokens</span><span
class="t joined">without a gap</span>: a teacher with another tokenizer scored them together, and d
is their joint gap. Point at a token for its numbers: log-probabilities of student and teacher, gap,
advantage A.</p>
</div>"""


def _section(section: Section, is_open: bool, max_tokens: int) -> str:
    parts = []
    for name, samples in section.groups.items():
        note = section.notes.get(name)
        parts.append(f"<h2>{_text(name)}</h2>")
        parts.append(f'<p class="note">{_text(note)}</p>' if note else "")
        parts += [_sample(sample, max_tokens) for sample in samples]
    flag = " open" if is_open else ""
    return (
        f"<details{flag}><summary>{_text(section.title)}</summary>\n"
        + "\n".join(p for p in parts if p)
        + "\n</details>"
    )


def _sample(sample: SampleView, max_tokens: int) -> str:
    verdict = "right" if sample.correct else "wrong"
    facts = [sample.title, f"reward {sample.reward:.4g}"]
    facts += [f"{name} {value:.4g}" for name, value in sample.parts.items()]
    facts += ["cut at the token limit"] if sample.truncated else []
    shown = sample.tokens[:max_tokens]
    if sample.tokens:
        text = "".join(map(_token, shown))
        facts += [_counts(sample.tokens)]
        left = len(sample.tokens) - len(shown)
        text += f'<span class="note"> … {left} more tokens</span>' if left else ""
    else:
        text = _text(sample.completion)
    listed = "".join(f"<span>{_text(fact)}</span>" for fact in facts)
    read = f"the teacher reads: <bdi>{_text(sample.teacher_prompt)}</bdi>"
    read = f'<div class="prompt">{read}</div>\n' if sample.teacher_prompt else ""
    return f"""<article>
<header><b class="{verdict}">{verdict}</b>{listed}</header>
<div class="prompt"><bdi>{_text(sample.prompt)}</bdi></div>
{read}<div class="completion">{text}</div>
</article>"""


def _token(token: TokenView) -> str:
    names = ["t", _shade(token.gap), token.fate, "imitated" if token.imitated else ""]
    names += ["joined"] * token.joined + ["unused"] * (not token.used)
    numbers = [f"log π   {token.student:+.3f}"]
    if token.teacher is not None and token.gap is not None:
        numbers += [f"log π_T {token.teacher:+.3f}", f"d       {token.gap:+.3f}"]
    numbers += [f"A       {token.advantage:+.3f}"]
    words = [w for w in (token.fate, names[3], "" if token.used else "not in the loss") if w]
    label = "\n".join([*numbers, ", ".join(words)] if words else numbers)
    return (
        f'<bdi class="{" ".join(n for n in names if n)}" data-n="{escape(label)}">'
        f"{_text(token.text) or '·'}</bdi>"
    )


def _shade(gap: float | None) -> str:
    """Return the CSS class of a gap in nats: ``n3`` to ``n1`` below 0, ``p1`` to ``p3`` above.

    >>> _shade(-4.0), _shade(0.05), _shade(1.0)
    ('n3', '', 'p2')
    """
    if gap is None:
        return ""
    level = sum(abs(gap) >= edge for edge in EDGES)
    return f"{'n' if gap < 0 else 'p'}{level}" if level else ""


def _text(value: str) -> str:
    return escape(visible(value))


def _counts(tokens: Sequence[TokenView]) -> str:
    fates = Counter(token.fate for token in tokens if token.fate)
    fates["imitated"] = sum(token.imitated for token in tokens)
    gaps = [token.gap for token in tokens if token.gap is not None and token.used]
    words = [f"{len(tokens)} tokens"] + [f"{n} {name}" for name, n in fates.items() if n]
    words += [f"mean d {sum(gaps) / len(gaps):+.3f}"] if gaps else []
    return ", ".join(words)
