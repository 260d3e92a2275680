"""Schedules of the objective's coefficients, and the callbacks that set these during a run."""

from kdrl_lightning.callbacks.schedules.curves import (
    Constant,
    Cosine,
    Linear,
    LinearWithFloor,
    PlateauSwitch,
    Schedule,
    Switch,
)

__all__ = [
    "Constant",
    "Cosine",
    "Linear",
    "LinearWithFloor",
    "PlateauSwitch",
    "Schedule",
    "Switch",
]
