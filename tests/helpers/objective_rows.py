"""Slow references of the methods' table: a function per row, one token at a time, on floats."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from helpers.objective_steps import (
    COMPLETIONS,
    CUT,
    GROUPS,
    MAX_TOKENS,
    REWARDS,
    THEIRS,
)
from helpers.objective_steps import CORRECT as C
from helpers.reference import published_trrd, surrogate, token_weights, trrd_ratio

LENGTHS = [0 if cut else len(c) for c, cut in zip(COMPLETIONS, CUT, strict=True)]
Token = Callable[[int, int], tuple[float, float]]


def advantages(rewards: list[float], scale: bool = True) -> list[float]:
    """Return GRPO's advantages, group by group."""
    out = []
    for reward, group in zip(rewards, GROUPS, strict=True):
        of_group = [r for r, g in zip(rewards, GROUPS, strict=True) if g == group]
        std = statistics.stdev(of_group) + 1e-6 if scale else 1.0
        out.append((reward - statistics.fmean(of_group)) / std)
    return out


def tables(batch: Any, scores: Any) -> SimpleNamespace:
    """Return the batch as lists, and the gap d on the student's own tokens."""
    x = SimpleNamespace(
        lp=scores.logprobs.tolist(),
        old=batch.old_logprobs.tolist(),
        teacher=batch.teacher_logprobs.tolist(),
        mu=batch.rollout_logprobs.tolist(),
        ref=batch.ref_logprobs.tolist(),
        A=advantages(REWARDS),
        wrong_group=[
            not any(c and h == g for c, h, t in zip(C, GROUPS, THEIRS, strict=True) if not t)
            for g in GROUPS
        ],
    )
    x.rho = lambda i, t: math.exp(x.lp[i][t]) / math.exp(x.old[i][t])
    x.d = lambda i, t: 0.0 if THEIRS[i] else x.teacher[i][t] - x.lp[i][t]
    return x


def slow(reduction: str, token: Token, divided_by: float | None = None) -> tuple[float, Any]:
    """Return loss and gradient of the step, token by token."""
    weights = token_weights(LENGTHS, GROUPS, reduction, MAX_TOKENS)
    value = 0.0
    gradient = torch.zeros(len(LENGTHS), max(map(len, COMPLETIONS)), dtype=torch.float64)
    for i, n in enumerate(LENGTHS):
        for t in range(n):
            loss, slope = token(i, t)
            weight = weights[i] if divided_by is None else 1 / divided_by
            value += weight * loss
            gradient[i, t] = weight * slope
    return value, gradient


def clipped(
    ratio: float, a: float, low: float = 0.2, high: float = 0.2, dual: float | None = None
) -> tuple[float, float]:
    """Return PPO's clipped loss and its slope; with ``dual`` the loss is bounded for A < 0."""
    if dual is not None and a < 0 and ratio > dual:
        return -dual * a, 0.0
    return surrogate(ratio, a, low, high)


def scaled(weight: float, pair: tuple[float, float]) -> tuple[float, float]:
    return weight * pair[0], weight * pair[1]


def plus(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return a[0] + b[0], a[1] + b[1]


def k2(x: Any, i: int, t: int, coef: float) -> tuple[float, float]:
    d = x.d(i, t)
    return coef * d**2 / 2, -coef * d


def k3(gap: float) -> tuple[float, float]:
    return math.exp(gap) - gap - 1, 1 - math.exp(gap)


def luffy(x: Any, i: int, t: int) -> tuple[float, float]:
    """Return the surrogate of f(x) = x / (x + .1); by log x, f has the slope .1 x / (x + .1)^2."""
    p, a = math.exp(x.lp[i][t]), x.A[i]
    return -a * p / (p + 0.1), -a * 0.1 * p / (p + 0.1) ** 2


def cispo(x: Any, i: int, t: int) -> tuple[float, float]:
    weight = min(x.rho(i, t), 1.28) * x.A[i]
    return -weight * x.lp[i][t], -weight


def rlsd(x: Any, i: int, t: int, mix: float = 0.5, width: float = 0.2) -> float:
    a = x.A[i]
    tilt = math.exp(math.copysign(1.0, a) * x.d(i, t))
    return a * ((1 - mix) + mix * min(max(tilt, 1 - width), 1 + width))


def trrd(x: Any, i: int, t: int, dual: float | None = None) -> tuple[float, float]:
    """Return TRRD's loss with the paper's clamp, which also changes the slope of log r."""
    ratio, slope = x.rho(i, t), 1.0
    if not THEIRS[i]:
        ratio, slope = published_trrd(x.lp[i][t], x.old[i][t], x.teacher[i][t], 0.5, 1.0)
    value, gradient = clipped(ratio, x.A[i], dual=dual)
    return value, gradient * slope


def trrd_offset(x: Any, i: int, t: int) -> tuple[float, float]:
    teacher = x.old[i][t] if THEIRS[i] else x.teacher[i][t]
    return clipped(trrd_ratio(x.lp[i][t], x.old[i][t], teacher, 0.5, 1.0), x.A[i])


def grpo(x: Any, i: int, t: int, **clip: float) -> tuple[float, float]:
    return clipped(x.rho(i, t), x.A[i], **clip)


def truncated(x: Any, i: int, t: int) -> float:
    return 1.0 if THEIRS[i] else min(math.exp(x.old[i][t]) / math.exp(x.mu[i][t]), 1.2)


def sdar(x: Any, i: int, t: int) -> tuple[float, float]:
    """Return c g d with a constant g; the slope by log pi is -c g."""
    gate = 0.0 if THEIRS[i] else 0.3 / (1 + math.exp(-5 * x.d(i, t)))
    return gate * x.d(i, t), -gate


def gopd(x: Any, i: int, t: int) -> tuple[float, float]:
    further = 0.0 if THEIRS[i] else 0.5 * (x.teacher[i][t] - x.ref[i][t])
    return clipped(x.rho(i, t), x.d(i, t) + further)


def scope_weights(x: Any, scale: str = "sum", tau: float = 1.0) -> list[float]:
    """Return a softmax over the group's correct completions, and another over its wrong ones."""
    out = [0.0] * len(GROUPS)
    for group in set(GROUPS):
        for verdict in (True, False):
            rows = [
                i
                for i, g in enumerate(GROUPS)
                if g == group and C[i] == verdict and LENGTHS[i] and not THEIRS[i]
            ]
            table = x.old if verdict else x.teacher
            means = [statistics.fmean(table[i][: LENGTHS[i]]) / tau for i in rows]
            powers = [math.exp(-m if verdict else m) for m in means]
            for i, power in zip(rows, powers, strict=True):
                out[i] = power / sum(powers) * (len(rows) if scale == "mean" else 1)
    return out


def scope(x: Any, i: int, t: int, scale: str = "sum", tau: float = 1.0) -> tuple[float, float]:
    slope = -scope_weights(x, scale, tau)[i] * x.rho(i, t) * (1.0 if C[i] else x.d(i, t))
    return slope, slope


def shaped(x: Any) -> list[float]:
    """Return advantages of r' = r + .3 mean d of the old student, divided by the std of r."""
    mean = [
        0.0
        if THEIRS[i] or not LENGTHS[i]
        else statistics.fmean(x.teacher[i][t] - x.old[i][t] for t in range(LENGTHS[i]))
        for i in range(len(GROUPS))
    ]
    out = []
    for i, group in enumerate(GROUPS):
        rows = [j for j, g in enumerate(GROUPS) if g == group]
        centre = statistics.fmean(REWARDS[j] + 0.3 * mean[j] for j in rows)
        out.append(REWARDS[i] + 0.3 * mean[i] - centre)
        out[-1] /= statistics.stdev(REWARDS[j] for j in rows) + 1e-6
    return out


ROWS: dict[str, Callable[[Any, int, int], tuple[float, float]]] = {
    "grpo": grpo,
    "grpo-dual": lambda x, i, t: grpo(x, i, t, dual=1.3),
    "dr-grpo": lambda x, i, t: clipped(x.rho(i, t), advantages(REWARDS, False)[i]),
    "dapo": lambda x, i, t: grpo(x, i, t, high=0.28),
    "cispo": cispo,
    "luffy": lambda x, i, t: luffy(x, i, t) if THEIRS[i] else grpo(x, i, t),
    "behavior": lambda x, i, t: (
        clipped(math.exp(x.lp[i][t] - x.mu[i][t]), x.A[i]) if THEIRS[i] else grpo(x, i, t)
    ),
    "reference": lambda x, i, t: plus(
        grpo(x, i, t), scaled(0.0 if THEIRS[i] else 0.2, k3(x.ref[i][t] - x.lp[i][t]))
    ),
    "truncated": lambda x, i, t: scaled(truncated(x, i, t), grpo(x, i, t)),
    "sft": lambda x, i, t: (-x.lp[i][t], -1.0),
    "kdrl": lambda x, i, t: plus(grpo(x, i, t), k2(x, i, t, 0.3)),
    "kdrl-weighted": lambda x, i, t: plus(grpo(x, i, t), k2(x, i, t, 0.3 * x.rho(i, t))),
    "kdrl-k3": lambda x, i, t: plus(grpo(x, i, t), scaled(0.3, k3(x.d(i, t)))),
    "kdrl-pg": lambda x, i, t: plus(
        grpo(x, i, t), (-0.3 * x.d(i, t) * x.lp[i][t], -0.3 * x.d(i, t))
    ),
    "kdrl-advantage": lambda x, i, t: clipped(x.rho(i, t), x.A[i] + 0.3 * x.d(i, t)),
    "kdrl-shaping": lambda x, i, t: clipped(x.rho(i, t), shaped(x)[i]),
    "kdrl-response": lambda x, i, t: plus(grpo(x, i, t), k2(x, i, t, 0.0 if C[i] else 0.3)),
    "kdrl-group": lambda x, i, t: plus(
        grpo(x, i, t), k2(x, i, t, 0.3 if x.wrong_group[i] else 0.0)
    ),
    "kdrl-truncated": lambda x, i, t: scaled(
        truncated(x, i, t), plus(grpo(x, i, t), k2(x, i, t, 0.3))
    ),
    "hdpo": lambda x, i, t: clipped(
        x.rho(i, t), x.A[i] + (0.3 * x.d(i, t) if x.wrong_group[i] else 0.0)
    ),
    "opd": lambda x, i, t: k2(x, i, t, 0.7),
    "opd-gap": lambda x, i, t: clipped(x.rho(i, t), x.d(i, t)),
    "srpo": lambda x, i, t: clipped(x.rho(i, t), x.A[i] if C[i] else x.d(i, t)),
    "rlsd": lambda x, i, t: clipped(x.rho(i, t), rlsd(x, i, t)),
    "rlad": trrd,
    "rlad-offset": trrd_offset,
    "rlad-dual": lambda x, i, t: trrd(x, i, t, 1.3),
    "sdar": lambda x, i, t: plus(grpo(x, i, t), sdar(x, i, t)),
    "gopd": gopd,
    "scope": scope,
    "grpo+rlad": lambda x, i, t: plus(scaled(0.5, grpo(x, i, t)), scaled(2.0, trrd(x, i, t))),
    "grpo+opd": lambda x, i, t: plus(grpo(x, i, t), k2(x, i, t, 0.4 * 0.7)),
}
