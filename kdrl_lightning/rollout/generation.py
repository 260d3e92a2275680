"""Sample completions and let the rewards judge them, in training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from kdrl_lightning.common.untyped import Row
from kdrl_lightning.engines.base import Completion, Sampling
from kdrl_lightning.models.end_tokens import EndTokens, first_end
from kdrl_lightning.rewards.base import Sample, Verdict
from kdrl_lightning.rewards.processes.runner import RewardRunner
from kdrl_lightning.rollout.policy import Tokenizer
from kdrl_lightning.rollout_batch import STUDENT

# A row holds values of any type, as a JSON line or a Hugging Face data set gives them.
EncodedPrompt: TypeAlias = tuple[Row, list[int]]
# Returns completions in the student's tokens, from completions, their rows, and the token limit.
Translate: TypeAlias = Callable[[Sequence[Completion], Sequence[Row], int], list[Completion]]


@dataclass(frozen=True)
class Judged:
    """One completion with its text and verdict.

    Attributes:
        prompt_ids: token ids of the prompt.
        row: row of the prompt.
        completion: token ids, log-probabilities and version.
        text: decoded completion that the rewards read.
        verdict: its reward and whether it is correct.
        source: ``STUDENT`` or ``TEACHER``, whichever sampled it.
    """

    prompt_ids: list[int]
    row: Row
    completion: Completion
    text: str
    verdict: Verdict
    source: int = STUDENT


class Generates(Protocol):
    """An engine, or anything that samples like one."""

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[list[int]], sampling: Sampling
    ) -> list[list[Completion]]:
        """Return a completion per seed for each prompt; see ``RolloutEngine.generate``."""


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
    translate: Translate | None = None,
) -> list[Judged]:
    """Return sampled and judged completions of ``(row, prompt ids)`` pairs.

    Every completion that is not truncated ends with one of the student's end tokens. If a teacher
    stops at another token, we replace that token; if it continues after one of the student's, we
    cut there. The text keeps special tokens, except the BOS, EOS and padding token and the final
    end token.

    Args:
        engine: samples the completions.
        tokenizer: the student's.
        rewards: judge the completions.
        prompts: P rows with their token ids.
        seeds: P lists of seeds, one seed per completion.
        sampling: length and temperature.
        training: whether a failing reward may stop the run.
        source: ``STUDENT`` or ``TEACHER``, whichever samples.
        ends: the student's end tokens; None: only the tokenizer's.
        translate: converts a teacher's completions to the student's tokens; None: leaves them.

    Returns:
        One entry per completion; completions of a prompt are next to each other.
    """
    if not prompts:
        return []
    ends = ends or EndTokens((tokenizer.eos_token_id,))
    groups = engine.generate([ids for _, ids in prompts], seeds, sampling)
    sampled = [
        (row, ids, c) for (row, ids), group in zip(prompts, groups, strict=True) for c in group
    ]
    made = [c for _, _, c in sampled]
    if translate is not None:
        made = translate(made, [row for row, _, _ in sampled], sampling.max_tokens)
    flat = [
        (row, ids, _ended(c, ends, row)) for (row, ids, _), c in zip(sampled, made, strict=True)
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
    """Decode with special tokens, because rewards read tags such as ``<think>``."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    frame = {getattr(tokenizer, name, None) for name in names}
    ids = [
        # A completion that is not truncated ends with one of the model's end tokens.
        [i for i in (c.ids if c.truncated else c.ids[:-1]) if i not in frame]
        for c in completions
    ]
    # The clean-up of some tokenizers removes spaces before punctuation.
    return tokenizer.batch_decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def _ended(completion: Completion, ends: EndTokens, row: Row) -> Completion:
    """Cut after the student's first end token; if none, replace the teacher's end token by one."""
    ids, logprobs = completion.ids, completion.logprobs
    length = first_end(ids, ends.ids)
    if ids[length - 1] in ends.ids:
        cut = completion.truncated and length == len(ids)
        return replace(completion, ids=ids[:length], logprobs=logprobs[:length], truncated=cut)
    if completion.truncated:
        return completion
    return replace(completion, ids=[*ids[:-1], ends.closing(row.get("prompt"))])
