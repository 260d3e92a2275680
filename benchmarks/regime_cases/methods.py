"""The methods that are compared in every regime, and the two more of the ablation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Method:
    """A configuration and what differs from it.

    Attributes:
        config: name of the file in ``configs``.
        flags: what differs.
        teacher: the method has one.
        verdicts: the method learns from them.
        updates: per rollout, as in the configuration.
    """

    config: str
    flags: list[str] = field(default_factory=list)
    teacher: bool = True
    verdicts: bool = True
    updates: int = 2


_OBJECTIVE = "--model.objective.init_args"
_THRESHOLDS = {"alignment_threshold": 1.0, "advantage_threshold": 0.0, "exploration_entropy": 0.3}
_GATES = [{"class_path": "Gates", "init_args": _THRESHOLDS}]
_GATED = f"{_OBJECTIVE}.selection={json.dumps(_GATES)}"


def _rlad(alpha: float, paper: bool, *flags: str) -> Method:
    """Return RLAD with one of the two clamps, at 1 nat; the clip is that of the other methods."""
    clamps = ("null", "1.0") if paper else ("1.0", "null")
    settings = {"trrd_alpha": alpha, "clip_low": 0.2, "clip_high": 0.2}
    named = zip(("offset_clamp", "log_ratio_clamp"), clamps, strict=True)
    own = [f"{_OBJECTIVE}.{name}={value}" for name, value in (*settings.items(), *named)]
    return Method("rlad", [*own, *flags], updates=4)


METHODS = {
    "GRPO": Method("grpo", teacher=False),
    "on-policy distillation": Method("on_policy_distillation", verdicts=False),
    "KDRL": Method("kdrl"),
    "KDRL-Annealing": Method("kdrl_annealing"),
    "OPD-then-RL": Method("opd_then_rl"),
    "RLSD": Method("rlsd"),
    "SRPO": Method("srpo"),
    **{f"RLAD α {a}": _rlad(a, False) for a in (0.3, 0.5, 0.8)},
    **{f"RLAD α {a}, paper's clamp": _rlad(a, True) for a in (0.3, 0.5, 0.8)},
}
# Selective imitation (the gates) × TRRD. Without TRRD, the teacher enters by KDRL's KL.
ABLATION = {
    "RLAD α 0.5 + gates": _rlad(0.5, False, _GATED),
    "KDRL + gates": Method("kdrl", [_GATED]),
}
EVERY_METHOD = {**METHODS, **ABLATION}
