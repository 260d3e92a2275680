"""Evaluation sets: their prompts, and how each set is sampled."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kdrl_lightning.engines.base import Sampling
from kdrl_lightning.errors import ConfigurationError, require_between, require_count
from kdrl_lightning.prompts.base import Prompts

# The mean over named sets; no set may have this name.
AVERAGE = "average"
# Settings that exclude unlikely tokens from sampling.
LIMITS = ("top_p", "top_k", "min_p")


@dataclass(frozen=True)
class EvaluationSettings:
    """How evaluation sets are sampled, unless an ``EvalSet`` says otherwise.

    Args:
        batch_size: prompts per batch and process.
        samples: completions per prompt.
        temperature: sampling temperature; 0 is greedy.
        k: the values of k for pass@k and majority@k, each from 1 to ``samples``; None: ``samples``,
            if that is above 1.
        top_p: sample from the most likely tokens that together have this probability; 1: from all.
        top_k: sample from this number of most likely tokens; 0: from all.
        min_p: exclude tokens with less than this share of the largest probability.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    batch_size: int = 256
    samples: int = 1
    temperature: float = 0.0
    k: Sequence[int] | None = None
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        sampling = Sampling(1, self.temperature, self.top_p, self.top_k, self.min_p)
        _check("evaluation.", self.samples, self.batch_size, sampling)


@dataclass(frozen=True)
class EvalSet:
    """One of several evaluation sets; None means the value of the data module's ``evaluation``.

    Attributes:
        prompts: the rows.
        samples: completions per prompt.
        temperature: sampling temperature; 0 is greedy.
        max_tokens: longest completion in tokens; None: the data module's ``max_tokens``.
        batch_size: prompts per batch and process.
        k: the values of k for pass@k and majority@k, each from 1 to ``samples``.
        top_p: see ``EvaluationSettings``.
        top_k: see ``EvaluationSettings``.
        min_p: see ``EvaluationSettings``.
    """

    prompts: Prompts
    samples: int | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    batch_size: int | None = None
    k: Sequence[int] | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None


EvalSets: TypeAlias = Prompts | Mapping[str, EvalSet]


@dataclass(frozen=True)
class NamedSet:
    """An evaluation set with all its settings resolved.

    Attributes:
        name: the set's name; empty if there is only one set, without a name.
        prompts: the rows.
        samples: completions per prompt.
        sampling: longest completion, temperature, and which tokens can be sampled.
        batch_size: prompts per batch and process.
        ks: the values of k for pass@k and majority@k.
    """

    name: str
    prompts: Prompts
    samples: int
    sampling: Sampling
    batch_size: int
    ks: tuple[int, ...]

    @property
    def prefix(self) -> str:
        """The part of a metric's name between stage and metric.

        >>> NamedSet("ood", [], 1, Sampling(8), 1, ()).prefix
        'ood/'
        """
        return f"{self.name}/" if self.name else ""


def named_sets(
    given: EvalSets | None, setting: str, default: EvaluationSettings, max_tokens: int
) -> list[NamedSet]:
    """Return the evaluation sets of a setting, in their order.

    Args:
        given: one prompt source, or sets by name.
        setting: the setting's name, for error messages.
        default: values for what a set leaves None.
        max_tokens: longest completion of a set that leaves it None, in tokens.

    Raises:
        ConfigurationError: there is no set, a name cannot be part of a metric's name, or a value is
            out of range.
    """
    if given is None:
        return []
    if not isinstance(given, Mapping):
        given = {"": EvalSet(given)}
    elif not given:
        raise ConfigurationError(
            f"`{setting}` must name at least one set: got none. Add a set, or remove the setting."
        )
    return [_complete(name, one, setting, default, max_tokens) for name, one in given.items()]


def _complete(
    name: str, one: EvalSet, setting: str, default: EvaluationSettings, max_tokens: int
) -> NamedSet:
    if name == AVERAGE:
        raise ConfigurationError(
            f"`{setting}` must not name a set `{AVERAGE}`, which stands for the mean over all "
            "sets: got a set of this name. Rename it."
        )
    if name and not re.fullmatch(r"[\w-]+", name):
        raise ConfigurationError(
            f"`{setting}` must name sets with letters, digits, - and _: got {name!r}. Rename it."
        )
    if not isinstance(one, EvalSet):
        raise ConfigurationError(
            f"`{setting}.{name}` must be an EvalSet: got {type(one).__name__}. "
            "Give `prompts`, and the settings that differ from the others."
        )
    where = f"{setting}.{name}." if name else "evaluation."
    samples = default.samples if one.samples is None else one.samples
    sampling = Sampling(
        max_tokens if one.max_tokens is None else one.max_tokens,
        default.temperature if one.temperature is None else one.temperature,
        default.top_p if one.top_p is None else one.top_p,
        default.top_k if one.top_k is None else one.top_k,
        default.min_p if one.min_p is None else one.min_p,
    )
    batch_size = default.batch_size if one.batch_size is None else one.batch_size
    _check(where, samples, batch_size, sampling)
    require_count(f"{where}max_tokens", sampling.max_tokens, 1, float("inf"))
    if samples > 1 and sampling.temperature == 0.0:
        raise ConfigurationError(
            f"`{where}temperature` must be above 0 for {samples} samples of a prompt: got 0. "
            "Greedy completions of one prompt are all equal: raise it, or set `samples` to 1."
        )
    if not sampling.whole and sampling.temperature == 0.0:
        plain = Sampling(1)
        used = [n for n in LIMITS if getattr(sampling, n) != getattr(plain, n)]
        given = ", ".join(f"`{name}`" for name in used)
        raise ConfigurationError(
            f"`{where}temperature` must be above 0 with {given}: got 0. Greedy sampling takes the "
            "most likely token: raise it, or leave them out."
        )
    ks = tuple((default.k if one.k is None else one.k) or ())
    if not ks and one.k is None:
        ks = (samples,) if samples > 1 else ()
    for k in ks:
        require_count(f"{where}k", k, 1, samples, "Lower it, or raise `samples`.")
    return NamedSet(name, one.prompts, samples, sampling, batch_size, ks)


def _check(where: str, samples: int, batch_size: int, sampling: Sampling) -> None:
    require_count(f"{where}samples", samples, 1, float("inf"))
    require_count(f"{where}batch_size", batch_size, 1, float("inf"))
    require_between(f"{where}temperature", sampling.temperature, 0.0, float("inf"), "0 is greedy.")
    if not 0.0 < sampling.top_p <= 1.0:
        raise ConfigurationError(
            f"`{where}top_p` must be above 0 and at most 1: got {sampling.top_p}. "
            "1 samples from all tokens."
        )
    require_count(f"{where}top_k", sampling.top_k, 0, float("inf"), "0 samples from all tokens.")
    require_between(f"{where}min_p", sampling.min_p, 0.0, 1.0, "0 samples from all tokens.")
