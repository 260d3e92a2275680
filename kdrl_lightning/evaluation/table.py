"""Compares the evaluations of several models in a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kdrl_lightning.evaluation.sets import NamedSet

Results = Mapping[str, Mapping[str, Mapping[str, float]]]


def by_set(values: Mapping[str, float], sets: Sequence[NamedSet]) -> dict[str, dict[str, float]]:
    """Return a test's metrics by set and metric name.

    Args:
        values: the metrics as Lightning logs them, ``test/<set>/<metric>``.
        sets: the evaluated sets.

    >>> from kdrl_lightning.engines import Sampling
    >>> by_set({"test/accuracy": 0.5}, [NamedSet("", [], 1, Sampling(8), 1, ())])
    {'': {'accuracy': 0.5}}
    """
    out = {}
    for one in sets:
        prefix = f"test/{one.prefix}"
        found = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
        out[one.name] = {name: value for name, value in found.items() if "/" not in name}
    return out


def markdown_table(results: Results, sets: Sequence[NamedSet]) -> str:
    """Return a Markdown table with one line per set and model.

    Shares are in per cent and lengths in tokens; the interval is the 95 % bootstrap interval over
    prompts.

    Args:
        results: values by model, set and metric.
        sets: the evaluated sets.
    """
    ks = sorted({k for one in sets for k in one.ks})
    names = [name for k in ks for name in (f"pass@{k}", f"majority@{k}")]
    head = ["set", "model", "pass@1", "95 %", *names]
    head += ["length", "right", "wrong", "truncated"]
    lines = [head]
    for one in sets:
        for model, by_name in results.items():
            found = by_name[one.name]
            low, high = _share(found, "accuracy_low"), _share(found, "accuracy_high")
            lines.append(
                [one.name or "-", model, _share(found, "accuracy"), f"{low} - {high}"]
                + [_share(found, name.replace("@", "_at_")) for name in names]
                + [_tokens(found, f"length_{which}") for which in ("mean", "right", "wrong")]
                + [_share(found, "truncated_frac")]
            )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["-" * widths[0], "-" * widths[1], *("-" * (w - 1) + ":" for w in widths[2:])]
    return "\n".join(_line(row, widths) for row in [head, aligned, *lines[1:]])


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    names = [cell.ljust(w) for cell, w in zip(row[:2], widths[:2], strict=True)]
    numbers = [cell.rjust(w) for cell, w in zip(row[2:], widths[2:], strict=True)]
    return f"| {' | '.join([*names, *numbers])} |"


def _share(values: Mapping[str, float], name: str) -> str:
    return f"{100 * values[name]:.1f}" if name in values else "-"


def _tokens(values: Mapping[str, float], name: str) -> str:
    return f"{values[name]:.1f}" if name in values else "-"
