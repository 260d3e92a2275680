"""Describes samples, and how the loss treats each of their tokens, for pages and loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kdrl_lightning.callbacks.reports.text import token_texts
from kdrl_lightning.common.untyped import HFTokenizer
from kdrl_lightning.objectives.base import Objective, teacher_logprobs
from kdrl_lightning.rollout.generation import Judged
from kdrl_lightning.rollout_batch import TEACHER, RolloutBatch

REWARDED, PUNISHED, DEAD, PROTECTED = "rewarded", "punished", "dead", "protected"


@dataclass(frozen=True)
class TokenView:
    """One token of a completion, and how the loss treats it.

    Attributes:
        text: the text that the token adds to the completion.
        student: the student's log-probability of the token in this update, in nats.
        teacher: the teacher's log-probability, in nats; None if the teacher did not score it. For a
            token in a chunk of several, see ``teacher_beside``.
        advantage: the advantage that multiplies the token's ratio.
        fate: ``rewarded`` (advantage above 0) or ``punished`` (below 0) if the token has a policy
            gradient; ``dead`` (above 0) or ``protected`` (below 0) if the clip removes it; empty if
            the advantage is 0 or the token is not part of the loss.
        imitated: whether the teacher contributes to the token's gradient.
        used: whether the token is part of the loss.
        joined: whether the teacher scored it in one chunk with the token before.
    """

    text: str
    student: float
    teacher: float | None
    advantage: float
    fate: str
    imitated: bool
    used: bool
    joined: bool = False

    @property
    def gap(self) -> float | None:
        """The teacher's gap d = log pi_T - log pi, in nats; None without a teacher."""
        return None if self.teacher is None else self.teacher - self.student


@dataclass(frozen=True)
class SampleView:
    """One completion with its prompt, verdict and tokens.

    Attributes:
        title: where the completion comes from.
        prompt: the prompt as text, with special tokens.
        completion: the completion as text.
        reward: the completion's reward.
        correct: whether the verifier accepts the completion.
        truncated: whether the completion was cut at the token limit.
        parts: the components of the reward by name.
        tokens: one view per token; empty if the tokens were not scored.
        teacher_prompt: what the teacher reads instead of the prompt; empty if it reads the same.
    """

    title: str
    prompt: str
    completion: str
    reward: float
    correct: bool
    truncated: bool
    parts: Mapping[str, float] = field(default_factory=dict)
    tokens: Sequence[TokenView] = ()
    teacher_prompt: str = ""


def choose(
    groups: Sequence[int], correct: Sequence[bool], count: int, cut: Sequence[int] = ()
) -> list[int]:
    """Choose ``count`` completions: first a right and a wrong one of each group that has both.

    Groups and completions in which the clip removes more tokens come first.

    Args:
        groups: each completion's group.
        correct: whether each completion is correct.
        count: number of indices to return; all, if there are fewer completions.
        cut: each completion's number of dead and protected tokens; empty: all have 0.

    >>> choose([0, 0, 1, 1, 1], [True, True, True, False, False], 3)
    [2, 3, 0]
    >>> choose([0, 0, 1, 1, 1], [True, False, True, False, False], 2, cut=[0, 0, 1, 0, 2])
    [2, 4]
    """
    cut = cut or [0] * len(groups)
    first: dict[int, dict[bool, int]] = {group: {} for group in groups}
    for i in sorted(range(len(groups)), key=lambda i: -cut[i]):
        first[groups[i]].setdefault(correct[i], i)
    pairs = [[found[True], found[False]] for found in first.values() if len(found) == 2]
    pairs.sort(key=lambda pair: -sum(cut[i] for i in pair))
    ordered = [i for pair in pairs for i in pair]
    singles = [next(iter(found.values())) for found in first.values() if len(found) == 1]
    chosen = [*ordered, *singles]
    rest = [i for i in range(len(groups)) if i not in set(chosen)]
    return [*chosen, *rest][:count]


def cut_tokens(batch: RolloutBatch, logprobs: Tensor, objective: Objective) -> list[int]:
    """Return how many tokens of each completion are dead or protected.

    Args:
        batch: B rows of a micro-batch, as the update got it.
        logprobs: ``[B, T]``, the student's log-probabilities in that update.
        objective: decides which tokens have no policy gradient.
    """
    advantages = objective.token_advantages(batch, logprobs)
    dead = objective.dead(batch, logprobs, advantages) & batch.loss_mask & (advantages != 0)
    return [int(count) for count in dead.sum(1)]


def scored_views(
    batch: RolloutBatch,
    logprobs: Tensor,
    objective: Objective,
    tokenizer: HFTokenizer,
    judged: Sequence[Judged] = (),
) -> list[SampleView]:
    """Return a view of each completion of a scored batch.

    Args:
        batch: B rows of a micro-batch, as the update got it.
        logprobs: ``[B, T]``, the student's log-probabilities in that update.
        objective: decides which tokens are imitated and which have no policy gradient.
        tokenizer: the student's tokenizer.
        judged: judged completions, including those of the batch, for the parts of their rewards.
    """
    advantages = objective.token_advantages(batch, logprobs)
    dead = objective.dead(batch, logprobs, advantages) & batch.loss_mask
    imitated = objective.imitated(batch, logprobs) & batch.loss_mask
    teacher = None if batch.teacher_logprobs is None else teacher_logprobs(batch, logprobs)
    known = {(tuple(j.prompt_ids), tuple(j.completion.ids)): j for j in judged}
    return [
        _scored(batch, row, (logprobs, advantages, dead, imitated), teacher, tokenizer, known)
        for row in range(len(batch))
    ]


def _scored(
    batch: RolloutBatch,
    row: int,
    columns: tuple[Tensor, ...],
    teacher: Tensor | None,
    tokenizer: HFTokenizer,
    known: Mapping[tuple[tuple[int, ...], tuple[int, ...]], Judged],
) -> SampleView:
    length, width = int(batch.completion_lengths[row]), int(batch.prompt_lengths[row])
    ids = batch.completion_ids[row, :length].tolist()
    prompt = batch.input_ids[row, :width].tolist()
    student, advantage, dead, imitated = (c[row, :length].tolist() for c in columns)
    used = batch.loss_mask[row, :length].tolist()
    places = [0] * length
    if batch.chunk_places is not None:
        places = batch.chunk_places[row, :length].tolist()
    scores: list[float | None] = [None] * length
    if teacher is not None:
        values = teacher[row, :length].tolist()
        scores = [v if p >= 0 else None for v, p in zip(values, places, strict=True)]
    texts = token_texts(tokenizer, ids)
    tokens = [
        TokenView(
            texts[t],
            student[t],
            scores[t],
            a,
            _fate(a, dead[t], used[t]),
            imitated[t],
            used[t],
            places[t] > 0,
        )
        for t, a in enumerate(advantage)
    ]
    found = known.get((tuple(prompt), tuple(ids)))
    by = "the teacher's" if int(batch.source[row]) == TEACHER else "the student's"
    lacks = batch.has_context is not None and not bool(batch.has_context[row])
    return SampleView(
        f"group {int(batch.group_ids[row])}, {by} completion{', without a context' * lacks}",
        tokenizer.decode(prompt, skip_special_tokens=False),
        "".join(texts),
        float(batch.rewards[row]),
        bool(batch.correct[row]),
        bool(batch.truncated[row]),
        {} if found is None else found.verdict.parts,
        tokens,
        _own_prompt(batch, row, prompt, tokenizer),
    )


def _own_prompt(batch: RolloutBatch, row: int, prompt: list[int], tokenizer: HFTokenizer) -> str:
    # A teacher with another end token may have another tokenizer, so we cannot decode its ids.
    if batch.teacher_prompt_ids is None or batch.teacher_ends is not None:
        return ""
    ids = [i for i in batch.teacher_prompt_ids[row].tolist() if i >= 0]
    return "" if ids == prompt else str(tokenizer.decode(ids, skip_special_tokens=False))


def _fate(advantage: float, dead: bool, used: bool) -> str:
    if not used or advantage == 0.0:
        return ""
    if advantage > 0.0:
        return DEAD if dead else REWARDED
    return PROTECTED if dead else PUNISHED


def text_view(judged: Judged, title: str, tokenizer: HFTokenizer) -> SampleView:
    """Return the view of a completion whose tokens were not scored.

    Args:
        judged: the completion with its verdict.
        title: where the completion comes from.
        tokenizer: the student's tokenizer.
    """
    return SampleView(
        title,
        tokenizer.decode(judged.prompt_ids, skip_special_tokens=False),
        judged.text,
        judged.verdict.reward,
        judged.verdict.correct,
        judged.completion.truncated,
        judged.verdict.parts,
    )
