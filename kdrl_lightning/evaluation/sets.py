"""Which prompts are evaluated, and how each set is sampled."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kdrl_lightning.engines.base import Sampling
from kdrl_lightning.errors import ConfigurationError, require_between
from kdrl_lightning.prompts.base import Prompts


@dataclass(frozen=True)
class EvaluationSettings:
    """How a set is sampled that does not say so itself.

    Args:
        batch_size: prompts per batch and process.
        samples: completions per prompt.
        temperature: 0 is greedy.
        k: of pass@k and majority@k, each from 1 to ``samples``; None: ``samples``, if that is above
            1.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    batch_size: int = 256
    samples: int = 1
    temperature: float = 0.0
    k: Sequence[int] | None = None

    def __post_init__(self) -> None:
        _check("evaluation.", self.samples, self.batch_size, self.temperature)


@dataclass(frozen=True)
class EvalSet:
    """One of several sets; what is None is as the data module's ``evaluation`` settings say.

    Attributes:
        prompts: the rows.
        samples: completions per prompt.
        temperature: 0 is greedy.
        max_tokens: longest completion; None: that of rollouts.
        batch_size: prompts per batch and process.
        k: of pass@k and majority@k, each from 1 to ``samples``.
    """

    prompts: Prompts
    samples: int | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    batch_size: int | None = None
    k: Sequence[int] | None = None


EvalSets: TypeAlias = Prompts | Mapping[str, EvalSet]


@dataclass(frozen=True)
class NamedSet:
    """A set with all that is needed to sample it.

    Attributes:
        name: empty for the only one without a name.
        prompts: the rows.
        samples: completions per prompt.
        sampling: temperature and length.
        batch_size: prompts per batch and process.
        ks: of pass@k and majority@k.
    """

    name: str
    prompts: Prompts
    samples: int
    sampling: Sampling
    batch_size: int
    ks: tuple[int, ...]

    @property
    def prefix(self) -> str:
        """What stands between stage and metric.

        >>> NamedSet("ood", [], 1, Sampling(8), 1, ()).prefix
        'ood/'
        """
        return f"{self.name}/" if self.name else ""


def named_sets(
    given: EvalSets | None, setting: str, default: EvaluationSettings, max_tokens: int
) -> list[NamedSet]:
    """Return the sets that a setting names, in its order.

    Args:
        given: one source, or sets by name.
        setting: how it is called, for messages.
        default: how a set is sampled that does not say so itself.
        max_tokens: likewise, of its completions.

    Raises:
        ConfigurationError: no set, a name that no metric can have, or values that cannot be.
    """
    if given is None:
        return []
    if not isinstance(given, Mapping):
        given = {"": EvalSet(given)}
    elif not given:
        raise ConfigurationError(f"`{setting}` must name at least one set: got none.")
    return [_complete(name, one, setting, default, max_tokens) for name, one in given.items()]


def _complete(
    name: str, one: EvalSet, setting: str, default: EvaluationSettings, max_tokens: int
) -> NamedSet:
    if name and not re.fullmatch(r"[\w-]+", name):
        raise ConfigurationError(
            f"`{setting}` must name sets by letters, digits, - and _: got {name!r}."
        )
    if not isinstance(one, EvalSet):
        raise ConfigurationError(
            f"`{setting}.{name}` must be an EvalSet: got {type(one).__name__}. "
            "Give `prompts`, and what else differs."
        )
    where = f"{setting}.{name}." if name else "evaluation."
    samples = default.samples if one.samples is None else one.samples
    sampling = Sampling(
        max_tokens if one.max_tokens is None else one.max_tokens,
        default.temperature if one.temperature is None else one.temperature,
    )
    batch_size = default.batch_size if one.batch_size is None else one.batch_size
    _check(where, samples, batch_size, sampling.temperature)
    require_between(f"{where}max_tokens", sampling.max_tokens, 1, float("inf"))
    if samples > 1 and sampling.temperature == 0.0:
        raise ConfigurationError(
            f"`{where}temperature` must be above 0 for {samples} samples of a prompt: got 0. "
            "Greedy completions of one prompt are all the same."
        )
    ks = tuple((default.k if one.k is None else one.k) or ())
    if not ks and one.k is None:
        ks = (samples,) if samples > 1 else ()
    for k in ks:
        require_between(f"{where}k", k, 1, samples, "It is a part of the samples of a prompt.")
    return NamedSet(name, one.prompts, samples, sampling, batch_size, ks)


def _check(where: str, samples: int, batch_size: int, temperature: float) -> None:
    require_between(f"{where}samples", samples, 1, float("inf"))
    require_between(f"{where}batch_size", batch_size, 1, float("inf"))
    require_between(f"{where}temperature", temperature, 0.0, float("inf"), "0 is greedy.")
