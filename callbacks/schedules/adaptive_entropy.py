"""Adaptive entropy control: an entropy bonus that holds the policy's entropy near a target."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch import Tensor

from kdrl_lightning.callbacks.base import RolloutCallback, StepOutputs
from kdrl_lightning.callbacks.schedules.coefficient_schedule import CoefficientSchedule
from kdrl_lightning.common.untyped import State
from kdrl_lightning.errors import ConfigurationError, require_between
from kdrl_lightning.rollout_batch import RolloutBatch
from kdrl_lightning.trainer.protocols import TrainedModule, callbacks_of, trained


class AdaptiveEntropy(RolloutCallback):
    """Moves the objective's ``entropy_coef`` after each rollout to hold a target entropy.

    Skywork-OR1 (arXiv 2505.22312): a coefficient c rises by ``step`` after a rollout with a mean
    entropy below ``target``, and falls by ``step`` after one above it, within ``lowest`` and
    ``highest``. The bonus has the weight c as long as the entropy is at most ``target``, else 0.
    We average the entropy over the loss tokens of a rollout's updates, in nats, and set the bonus
    of the next rollout.

    Checkpoints hold c, the last rollout's entropy, and the sums of an unfinished rollout.

    Args:
        target: entropy per token to hold, in nats.
        step: change of c per rollout, above 0.
        lowest: smallest c.
        highest: largest c [our choice; Skywork-OR1 has no bound].
        start: c of the first rollout.

    Raises:
        ConfigurationError: a value is out of range.

    >>> control = AdaptiveEntropy(target=0.2, step=0.005)
    >>> control.after(0.0, entropy=0.1), control.after(0.005, entropy=0.3)
    (0.005, 0.0)
    >>> control.weight(0.005, entropy=0.1), control.weight(0.005, entropy=0.3)
    (0.005, 0.0)
    """

    def __init__(
        self,
        target: float = 0.2,
        step: float = 5e-3,
        lowest: float = 0.0,
        highest: float = 0.1,
        start: float = 0.0,
    ) -> None:
        require_between("target", target, 0.0, float("inf"))
        if not 0.0 < step < float("inf"):
            raise ConfigurationError(
                f"`step` must be above 0 and finite: got {step}. Skywork-OR1 uses 0.005."
            )
        require_between("lowest", lowest, 0.0, float("inf"))
        require_between("highest", highest, lowest, float("inf"), "It must not be below lowest.")
        require_between("start", start, lowest, highest)
        self.target = target
        self.step = step
        self.lowest = lowest
        self.highest = highest
        self.start = start
        self.coefficient = start
        self.entropy = 0.0  # of the last rollout; before the first, 0 gives the bonus the weight c
        self._before: float | None = None
        self._sums = 0.0, 0.0  # entropy and tokens of this rollout so far, over all ranks
        self._micro: Tensor | None = None  # the same sums for this rank's unfinished step

    def after(self, coefficient: float, entropy: float) -> float:
        """Return c after a rollout with this mean entropy, in nats."""
        moved = coefficient
        if entropy != self.target:
            moved += self.step if entropy < self.target else -self.step
        return min(max(moved, self.lowest), self.highest)

    def weight(self, coefficient: float, entropy: float) -> float:
        """Return the bonus's weight in the loss after a rollout with this mean entropy, in nats."""
        return coefficient if entropy <= self.target else 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that no other callback sets ``entropy_coef``."""
        if stage != "fit":
            return
        rivals = [
            callback
            for callback in callbacks_of(trainer)
            if callback is not self
            and (
                isinstance(callback, AdaptiveEntropy)
                or (
                    isinstance(callback, CoefficientSchedule)
                    and callback.coefficient == "entropy_coef"
                )
            )
        ]
        if rivals:
            raise ConfigurationError(
                "`callbacks` must have one that sets entropy_coef: got AdaptiveEntropy and "
                f"{type(rivals[0]).__name__}. Remove the others."
            )
        self.coefficient, self.entropy, self._sums, self._micro = self.start, 0.0, (0.0, 0.0), None
        self._before = trained(pl_module).objective.coefficient("entropy_coef")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the objective's coefficient."""
        if self._before is not None:
            trained(pl_module).objective.set_coefficient("entropy_coef", self._before)
            self._before = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the coefficient before the first rollout."""
        self._set(trained(pl_module))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Log the coefficient of this update."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        module = trained(pl_module)
        module.log_step({"policy/entropy_coef": module.objective.coefficient("entropy_coef")})

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: StepOutputs,
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        """Add a micro-batch's entropy."""
        entropy = outputs["entropy"].where(batch.loss_mask, 0.0).sum(dtype=torch.float64)
        added = torch.stack([entropy, batch.loss_mask.sum().double()])
        self._micro = added if self._micro is None else self._micro + added
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the step's entropy over all ranks; a collective."""
        assert self._micro is not None, "a step has a micro-batch"
        entropy, tokens = trained(pl_module).reduce(self._micro, "sum").tolist()
        self._micro = None
        self._sums = self._sums[0] + entropy, self._sums[1] + tokens

    def on_rollout_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, rollout: int
    ) -> None:
        """Move the coefficient for the next rollout."""
        entropy, tokens = self._sums
        self._sums = 0.0, 0.0
        if tokens:
            self.entropy = entropy / tokens
            self.coefficient = self.after(self.coefficient, self.entropy)
        self._set(trained(pl_module))

    def state_dict(self) -> State:
        """Return c, the last rollout's entropy, and the sums of the unfinished one."""
        return {"coefficient": self.coefficient, "entropy": self.entropy, "sums": [*self._sums]}

    def load_state_dict(self, state_dict: State) -> None:
        """Restore what ``state_dict`` returned."""
        self.coefficient = state_dict["coefficient"]
        self.entropy = state_dict["entropy"]
        entropy, tokens = state_dict["sums"]
        self._sums = entropy, tokens

    def _set(self, pl_module: TrainedModule) -> None:
        value = self.weight(self.coefficient, self.entropy)
        pl_module.objective.set_coefficient("entropy_coef", value)
