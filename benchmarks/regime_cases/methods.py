"""The methods that are compared in every regime, and two more for the ablation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Method:
    """A configuration and what differs from it.

    Attributes:
        config: name of the file in ``configs``.
        flags: command-line flags that change its settings.
        teacher: the method has a teacher.
        verdicts: the method learns from the verifier's verdicts.
        updates: optimizer steps per rollout, as in the configuration.
        rate_of: name of the method whose learning rate it takes; None: it has a separate search.
    """

    config: str
    flags: list[str] = field(default_factory=list)
    teacher: bool = True
    verdicts: bool = True
    updates: int = 2
    rate_of: str | None = None


_OBJECTIVE = "--model.objective.init_args"
_THRESHOLDS = {"alignment_threshold": 1.0, "advantage_threshold": 0.0, "exploration_entropy": 0.3}
_GATES = [{"class_path": "Gates", "init_args": _THRESHOLDS}]
_GATED = f"{_OBJECTIVE}.selection={json.dumps(_GATES)}"


def _rlad(alpha: float, paper: bool, *flags: str, rate_of: str | None = None) -> Method:
    """Return RLAD with one of the two clamps, at 1 nat; the clip is that of the other methods."""
    clamps = ("null", "1.0") if paper else ("1.0", "null")
    settings = {"trrd_alpha": alpha, "clip_low": 0.2, "clip_high": 0.2}
    named = zip(("offset_clamp", "log_ratio_clamp"), clamps, strict=True)
    own = [f"{_OBJECTIVE}.{name}={value}" for name, value in (*settings.items(), *named)]
    return Method("rlad", [*own, *flags], updates=4, rate_of=rate_of)


MAIN = {
    "GRPO": Method("grpo", teacher=False),
    "on-policy distillation": Method("on_policy_distillation", verdicts=False),
    "KDRL": Method("kdrl"),
    "KDRL-Annealing": Method("kdrl_annealing"),
    "OPD-then-RL": Method("opd_then_rl"),
    "RLSD": Method("rlsd"),
    "SRPO": Method("srpo"),
    "RLAD α 0.8, offset clamp": _rlad(0.8, False),
    "RLAD α 0.5, offset clamp": _rlad(0.5, False),
    "RLAD α 0.5": _rlad(0.5, True),
}
# RLAD's other settings, with the rate of the nearest one.
VARIANTS = {
    "RLAD α 0.3, offset clamp": _rlad(0.3, False, rate_of="RLAD α 0.5, offset clamp"),
    "RLAD α 0.8": _rlad(0.8, True, rate_of="RLAD α 0.8, offset clamp"),
    "RLAD α 0.3": _rlad(0.3, True, rate_of="RLAD α 0.5"),
}
# Selective imitation (the gates) × TRRD. Without TRRD, the teacher enters by KDRL's KL.
ABLATION = {
    "RLAD α 0.5, offset clamp + gates": _rlad(
        0.5, False, _GATED, rate_of="RLAD α 0.5, offset clamp"
    ),
    "KDRL + gates": Method("kdrl", [_GATED], rate_of="KDRL"),
}
EVERY_METHOD = {**MAIN, **VARIANTS, **ABLATION}
