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
class EvalSet:
    """One of several sets; what is None is as the data module's ``val_*`` settings say.

    Attributes:
        prompts: the rows.
        samples: completions per prompt.
        temperature: 0 is greedy.
        max_tokens: longest completion; None: the data module's ``max_tokens``.
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


def named_sets(given: EvalSets | None, setting: str, default: NamedSet) -> list[NamedSet]:
    """Return the sets that a setting names, in its order.

    Args:
        given: one source, or sets by name.
        setting: how it is called, for messages.
        default: how a set is sampled that does not say so itself.

    Raises:
        ConfigurationError: no set, a name that no metric can have, or values that cannot be.
    """
    if given is None:
        return []
    if not isinstance(given, Mapping):
        given = {"": EvalSet(given)}
    elif not given:
        raise ConfigurationError(f"`{setting}` must name at least one set: got none.")
    return [_complete(name, own, setting, default) for name, own in given.items()]


def _complete(name: str, own: EvalSet, setting: str, default: NamedSet) -> NamedSet:
    if name and not re.fullmatch(r"[\w-]+", name):
        raise ConfigurationError(
            f"`{setting}` must name sets by letters, digits, - and _: got {name!r}."
        )
    if not isinstance(own, EvalSet):
        raise ConfigurationError(
            f"`{setting}.{name}` must be an EvalSet: got {type(own).__name__}. "
            "Give `prompts`, and what else differs."
        )
    where = f"{setting}.{name}." if name else "val_"
    samples = default.samples if own.samples is None else own.samples
    sampling = Sampling(
        default.sampling.max_tokens if own.max_tokens is None else own.max_tokens,
        default.sampling.temperature if own.temperature is None else own.temperature,
    )
    batch_size = default.batch_size if own.batch_size is None else own.batch_size
    require_between(f"{where}samples", samples, 1, float("inf"))
    require_between(f"{where}batch_size", batch_size, 1, float("inf"))
    require_between(f"{where}max_tokens", sampling.max_tokens, 1, float("inf"))
    require_between(f"{where}temperature", sampling.temperature, 0.0, float("inf"), "0 is greedy.")
    if samples > 1 and sampling.temperature == 0.0:
        raise ConfigurationError(
            f"`{where}temperature` must be above 0 for {samples} samples of a prompt: got 0. "
            "Greedy completions of one prompt are all the same."
        )
    ks = default.ks if own.k is None else tuple(own.k)
    if not ks and own.k is None:
        ks = (samples,) if samples > 1 else ()
    for k in ks:
        require_between(f"{where}k", k, 1, samples, "It is a part of the samples of a prompt.")
    return NamedSet(name, own.prompts, samples, sampling, batch_size, ks)
