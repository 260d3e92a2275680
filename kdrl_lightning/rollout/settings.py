"""How a rollout is sampled and used: the settings that slots, source, checks and resume share."""

from __future__ import annotations

from dataclasses import dataclass

from kdrl_lightning.engines.base import RolloutEngine
from kdrl_lightning.errors import ConfigurationError, require_between

ANY = float("inf")


@dataclass(frozen=True)
class RolloutSettings:
    """How rollouts are sampled, and how the updates use them.

    Example: 32 prompts with 8 completions each, cut into 2 mini-batches and replayed once more, are
    256 completions and 4 optimizer steps::

        RolloutSettings(prompts_per_rollout=32, group_size=8, minibatches_per_rollout=2,
                        epochs_per_rollout=2)

    Args:
        prompts_per_rollout: prompts of one rollout, over all processes.
        group_size: completions per prompt that the student samples; 0 with completions of the
            teacher trains on those alone.
        max_tokens: longest completion, the end token included.
        temperature: sampling temperature of rollouts; log-probabilities are taken at it.
        minibatches_per_rollout: disjoint parts of a rollout, whole groups, one update each.
        epochs_per_rollout: how often a rollout is replayed.
        max_off_policy_steps: how many rollouts old the weights may be that sample one. 0: none. 1:
            the next rollout is sampled while the present one trains, by an engine that can
            (``VLLMServerEngine``); importance weights on sampled tokens correct for it.
        rollouts_per_epoch: rollouts of one trainer epoch (validation follows it); None: as many as
            take each prompt once.
        max_refills: how often a group whose rewards are all equal is replaced by another prompt's
            (DAPO's dynamic sampling). Prompts kept for refills are skipped where none is needed.
        mask_truncated: leave completions cut at ``max_tokens`` out of the loss.
        max_tokens_per_micro_batch: tokens, padding included, for which memory is enough. The worst
            case is checked before training, and no micro-batch is larger; None: no limit.

    Raises:
        ConfigurationError: a value is out of its range.
    """

    prompts_per_rollout: int = 32
    group_size: int = 8
    max_tokens: int = 512
    temperature: float = 1.0
    minibatches_per_rollout: int = 1
    epochs_per_rollout: int = 1
    max_off_policy_steps: int = 0
    rollouts_per_epoch: int | None = None
    max_refills: int = 0
    mask_truncated: bool = False
    max_tokens_per_micro_batch: int | None = None

    def __post_init__(self) -> None:
        require_between("prompts_per_rollout", self.prompts_per_rollout, 1, ANY)
        require_between("group_size", self.group_size, 0, ANY)
        require_between("max_tokens", self.max_tokens, 1, ANY)
        require_temperature("temperature", self.temperature)
        require_between("minibatches_per_rollout", self.minibatches_per_rollout, 1, ANY)
        require_between("epochs_per_rollout", self.epochs_per_rollout, 1, ANY)
        require_between("max_refills", self.max_refills, 0, ANY)
        if self.rollouts_per_epoch is not None:
            require_between("rollouts_per_epoch", self.rollouts_per_epoch, 1, ANY)
        if self.max_tokens_per_micro_batch is not None:
            require_between("max_tokens_per_micro_batch", self.max_tokens_per_micro_batch, 1, ANY)
        if self.max_off_policy_steps not in (0, 1):
            raise ConfigurationError(
                f"`max_off_policy_steps` must be 0 or 1 rollouts: got {self.max_off_policy_steps}."
            )

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps taken on one rollout."""
        return self.minibatches_per_rollout * self.epochs_per_rollout


@dataclass(frozen=True)
class TeacherCompletions:
    """Completions that the teacher adds to each group; they are rewarded like the student's.

    Args:
        count: completions per prompt; 0: none.
        temperature: sampling temperature of the teacher; None: the student's.
        engine: samples them; the transformers engine if None.

    Raises:
        ConfigurationError: a value is out of its range, or has no effect.
    """

    count: int = 0
    temperature: float | None = None
    engine: RolloutEngine | None = None

    def __post_init__(self) -> None:
        require_between("teacher_completions.count", self.count, 0, ANY)
        if self.temperature is None:
            return
        if not self.count:
            raise ConfigurationError(
                "`teacher_completions.temperature` must go with a `count`: got "
                f"{self.temperature} and no completions."
            )
        require_temperature("teacher_completions.temperature", self.temperature)


def require_temperature(name: str, value: float) -> None:
    """Check that a temperature can be that of rollouts.

    Raises:
        ConfigurationError: it is not above 0.
    """
    if not 0.0 < value < ANY:
        raise ConfigurationError(
            f"`{name}` must be above 0 for rollouts: got {value}. "
            "Greedy sampling has no gradient; 1.0 is usual."
        )
