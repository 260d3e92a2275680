"""What the module does for self-teachers: it moves their weights and keeps them in its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kdrl_lightning.teachers.self_teachers.found import drop_kept

# `Any`: Lightning's attributes and arguments; Lightning is not imported here.


class SelfTeacherSteps:
    """Mixin of a ``LightningModule`` that keeps and moves the weights of self-teachers.

    List it before ``LightningModule`` among the bases, so that it extends the hooks.

    Attributes:
        self_teachers: the weights that self-teachers keep; None if there are none.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.self_teachers: nn.ModuleList | None = None

    def keep_self_teachers(self) -> None:
        """Make the weights that self-teachers keep part of the module's state."""
        kept = self._module.frozen.kept
        if kept:
            self.self_teachers = nn.ModuleList(kept)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights; an evaluation leaves out those of self-teachers."""
        state = state_dict if self.self_teachers is not None else drop_kept(state_dict)
        return super().load_state_dict(state, strict, assign)  # type: ignore[misc]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take an optimizer step; unless it was skipped, self-teachers follow the student."""
        module = self._module
        step, skipped = module.trainer.global_step, module.nonfinite.skipped
        super().optimizer_step(*args, **kwargs)  # type: ignore[misc]
        if module.nonfinite.skipped == skipped:
            module.frozen.follow(step + 1 - skipped)

    @property
    def _module(self) -> Any:
        """This module as ``Any``: its other bases and constructor set what this class reads."""
        return self
