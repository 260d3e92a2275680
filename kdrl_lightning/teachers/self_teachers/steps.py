"""What a module does for self-teachers: they follow its optimizer steps and are in its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kdrl_lightning.teachers.self_teachers.found import drop_kept

# `Any`: Lightning's attributes and arguments; Lightning is not imported here.


class SelfTeacherSteps:
    """The part of a ``LightningModule`` that keeps the weights of self-teachers.

    Named before ``LightningModule`` among a class's bases, it extends its hooks.

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
        """Load weights; an evaluation has no use for those of self-teachers."""
        state = state_dict if self.self_teachers is not None else drop_kept(state_dict)
        return super().load_state_dict(state, strict, assign)  # type: ignore[misc]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take an optimizer step, and let self-teachers follow it unless it was skipped."""
        module = self._module
        step, skipped = module.trainer.global_step, module.nonfinite.skipped
        super().optimizer_step(*args, **kwargs)  # type: ignore[misc]
        if module.nonfinite.skipped == skipped:
            module.frozen.follow(step + 1 - skipped)

    @property
    def _module(self) -> Any:
        """The module, whose other bases and constructor give it what this class reads."""
        return self
