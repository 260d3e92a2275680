"""Compares the evaluations of several models in a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kdrl_lightning.evaluation.sets import AVERAGE, NamedSet

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
    if len(sets) > 1:
        prefix = f"test/{AVERAGE}/"
        found = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
        out[AVERAGE] = found
    return out


def described(one: NamedSet) -> str:
    """Return one line that says how a set is sampled.

    >>> from kdrl_lightning.engines import Sampling
    >>> described(NamedSet("aime", [], 32, Sampling(8192, 0.6, top_p=0.95), 1, ()))
    'aime: 32 samples per prompt at temperature 0.6, top-p 0.95, at most 8192 tokens'
    """
    sampling, parts = one.sampling, []
    if sampling.top_p < 1.0:
        parts.append(f"top-p {sampling.top_p:g}")
    if sampling.top_k:
        parts.append(f"top-k {sampling.top_k}")
    if sampling.min_p:
        parts.append(f"min-p {sampling.min_p:g}")
    how = f"temperature {sampling.temperature:g}" + ("" if sampling.temperature else " (greedy)")
    many = "1 sample" if one.samples == 1 else f"{one.samples} samples"
    listed = ", ".join([how, *parts, f"at most {sampling.max_tokens} tokens"])
    return f"{one.name or 'prompts'}: {many} per prompt at {listed}"


def markdown_table(results: Results, sets: Sequence[NamedSet]) -> str:
    """Return a Markdown table with one line per set and model, and one for the mean over sets.

    Shares are in per cent and lengths in tokens; pass@1 is the mean over all samples of a prompt
    (Mean@n), and the interval is the 95 % bootstrap interval over prompts. Lines below the table
    say how each set is sampled.

    Args:
        results: values by model, set and metric.
        sets: the evaluated sets.
    """
    ks = sorted({k for one in sets for k in one.ks})
    names = [name for k in ks for name in (f"pass@{k}", f"majority@{k}")]
    head = ["set", "model", "pass@1", "95 %", *names]
    head += ["length", "right", "wrong", "truncated"]
    lines = [head]
    for set_name in [one.name for one in sets] + ([AVERAGE] if len(sets) > 1 else []):
        for model, by_name in results.items():
            found = by_name[set_name]
            low, high = _share(found, "accuracy_low"), _share(found, "accuracy_high")
            lines.append(
                [set_name or "-", model, _share(found, "accuracy"), f"{low} - {high}"]
                + [_share(found, name.replace("@", "_at_")) for name in names]
                + [_tokens(found, f"length_{which}") for which in ("mean", "right", "wrong")]
                + [_share(found, "truncated_frac")]
            )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["-" * widths[0], "-" * widths[1], *("-" * (w - 1) + ":" for w in widths[2:])]
    table = [_line(row, widths) for row in [head, aligned, *lines[1:]]]
    return "\n".join([*table, "", *(f"- {described(one)}" for one in sets)])


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    names = [cell.ljust(w) for cell, w in zip(row[:2], widths[:2], strict=True)]
    numbers = [cell.rjust(w) for cell, w in zip(row[2:], widths[2:], strict=True)]
    return f"| {' | '.join([*names, *numbers])} |"


def _share(values: Mapping[str, float], name: str) -> str:
    return f"{100 * values[name]:.1f}" if name in values else "-"


def _tokens(values: Mapping[str, float], name: str) -> str:
    return f"{values[name]:.1f}" if name in values else "-"
