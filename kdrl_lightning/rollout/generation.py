"""Prompts in, judged completions out: the part that training and evaluation share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

from kdrl_lightning.engines.base import Completion, Sampling
from kdrl_lightning.models.end_tokens import EndTokens, first_end
from kdrl_lightning.rewards.base import Sample, Verdict
from kdrl_lightning.rewards.processes.runner import RewardRunner
from kdrl_lightning.rollout.policy import Tokenizer
from kdrl_lightning.rollout_batch import STUDENT

EncodedPrompt: TypeAlias = tuple[Mapping[str, Any], list[int]]


@dataclass(frozen=True)
class Judged:
    """One completion with its text and verdict; ``source`` says whose it is."""

    prompt_ids: list[int]
    row: Mapping[str, Any]
    completion: Completion
    text: str
    verdict: Verdict
    source: int = STUDENT


class Generates(Protocol):
    """An engine, or what stands for one."""

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[list[int]], sampling: Sampling
    ) -> list[list[Completion]]:
        """Sample; see ``RolloutEngine.generate``."""


def sample_and_judge(
    engine: Generates,
    tokenizer: Tokenizer,
    rewards: RewardRunner,
    prompts: Sequence[EncodedPrompt],
    seeds: Sequence[list[int]],
    sampling: Sampling,
    training: bool = True,
    source: int = STUDENT,
    ends: EndTokens | None = None,
) -> list[Judged]:
    """Sample completions for ``(row, prompt ids)`` pairs and judge them.

    A completion ends with one of the student's end tokens: a teacher may have stopped at one that
    only it has, or written more after the student's. Its text keeps all special tokens but those
    that begin, end and pad a turn.

    Args:
        engine: samples.
        tokenizer: the student's.
        rewards: judge.
        prompts: P rows with their token ids.
        seeds: P lists of seeds, one completion each.
        sampling: length and temperature.
        training: a failing reward may stop the run.
        source: who samples.
        ends: the student's end tokens; None: the tokenizer's alone.

    Returns:
        One entry per completion, those of a prompt next to each other.
    """
    if not prompts:
        return []
    ends = ends or EndTokens((tokenizer.eos_token_id,))
    groups = engine.generate([ids for _, ids in prompts], seeds, sampling)
    flat = [
        (row, ids, _ended(c, ends, row))
        for (row, ids), group in zip(prompts, groups, strict=True)
        for c in group
    ]
    texts = _texts(tokenizer, [c for _, _, c in flat])
    samples = [
        Sample(text, c.ids, row, c.truncated) for (row, _, c), text in zip(flat, texts, strict=True)
    ]
    verdicts = rewards(samples, training)
    return [
        Judged(ids, row, c, sample.text, verdict, source)
        for (row, ids, c), sample, verdict in zip(flat, samples, verdicts, strict=True)
    ]


def _texts(tokenizer: Tokenizer, completions: Sequence[Completion]) -> list[str]:
    """Decode; tags as ``<think>`` are special tokens of some tokenizers, and rewards read them."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    frame = {getattr(tokenizer, name, None) for name in names}
    ids = [
        # What is not cut ends with an end token, of which a model may have several.
        [i for i in (c.ids if c.truncated else c.ids[:-1]) if i not in frame]
        for c in completions
    ]
    return tokenizer.batch_decode(ids, skip_special_tokens=False)


def _ended(completion: Completion, ends: EndTokens, row: Mapping[str, Any]) -> Completion:
    """Cut after the first end token; replace an end that is not the student's by one that is."""
    ids, logprobs = completion.ids, completion.logprobs
    length = first_end(ids, ends.ids)
    if ids[length - 1] in ends.ids:
        cut = completion.truncated and length == len(ids)
        return replace(completion, ids=ids[:length], logprobs=logprobs[:length], truncated=cut)
    if completion.truncated:
        return completion
    return replace(completion, ids=[*ids[:-1], ends.closing(row.get("prompt"))])
