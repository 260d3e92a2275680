"""Settings of rollouts: how they are sampled, and how updates use them."""

from __future__ import annotations

from dataclasses import dataclass

from kdrl_lightning.engines.base import RolloutEngine
from kdrl_lightning.errors import ConfigurationError, require_count

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
        group_size: completions per prompt that the student samples; 0: train only on completions
            of the teacher.
        max_tokens: most tokens of a completion, with the end token.
        temperature: sampling temperature of rollouts; log-probabilities are taken at it.
        minibatches_per_rollout: number of disjoint parts of a rollout; each has whole groups and
            gives one update.
        epochs_per_rollout: number of passes over a rollout.
        max_off_policy_steps: how many rollouts old the sampling weights may be. 0: always current.
            1: an asynchronous engine (``VLLMServerEngine``) samples the next rollout while this one
            trains, and importance weights on sampled tokens correct for it.
        rollouts_per_epoch: rollouts of one trainer epoch, after which validation runs; None: enough
            to use each prompt once.
        max_refills: how often a group with equal rewards is replaced by a group of another prompt
            (DAPO's dynamic sampling, arXiv 2503.14476). Each rollout reserves prompts for refills
            and skips those that it does not need.
        mask_truncated: leave completions cut at ``max_tokens`` out of the loss.
        mask_flat_groups: leave groups with equal rewards out of the loss and of its denominators,
            without a replacement (rejection sampling in Skywork-OR1, arXiv 2505.22312). If false,
            they give no policy gradient, but count as tokens, and a teacher, an entropy bonus and a
            reference KL act on them.
        max_tokens_per_micro_batch: most tokens of a micro-batch, with padding, that fit into
            memory. The worst case is checked before training; None: no limit.

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
    mask_flat_groups: bool = False
    max_tokens_per_micro_batch: int | None = None

    def __post_init__(self) -> None:
        require_count("prompts_per_rollout", self.prompts_per_rollout, 1, ANY)
        require_count("group_size", self.group_size, 0, ANY)
        require_count("max_tokens", self.max_tokens, 1, ANY)
        require_temperature("temperature", self.temperature)
        require_count("minibatches_per_rollout", self.minibatches_per_rollout, 1, ANY)
        require_count("epochs_per_rollout", self.epochs_per_rollout, 1, ANY)
        require_count("max_refills", self.max_refills, 0, ANY)
        if self.rollouts_per_epoch is not None:
            require_count("rollouts_per_epoch", self.rollouts_per_epoch, 1, ANY)
        if self.max_tokens_per_micro_batch is not None:
            require_count("max_tokens_per_micro_batch", self.max_tokens_per_micro_batch, 1, ANY)
        if self.max_off_policy_steps not in (0, 1):
            raise ConfigurationError(
                f"`max_off_policy_steps` must be 0 or 1 rollouts: got {self.max_off_policy_steps}. "
                "1 samples the next rollout while this one trains."
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
        engine: engine that samples them; None: the transformers engine.

    Raises:
        ConfigurationError: a value is out of its range or has no effect.
    """

    count: int = 0
    temperature: float | None = None
    engine: RolloutEngine | None = None

    def __post_init__(self) -> None:
        require_count("teacher_completions.count", self.count, 0, ANY)
        if self.temperature is None:
            return
        if not self.count:
            raise ConfigurationError(
                "`teacher_completions.temperature` must be given with a `count` above 0: got "
                f"{self.temperature} and no completions. Set `teacher_completions.count`."
            )
        require_temperature("teacher_completions.temperature", self.temperature)


def require_temperature(name: str, value: float) -> None:
    """Raise unless rollouts can be sampled at a temperature.

    Args:
        name: name of the setting, for the message.
        value: the temperature.

    Raises:
        ConfigurationError: the temperature is not above 0 and finite.
    """
    if not 0.0 < value < ANY:
        raise ConfigurationError(
            f"`{name}` must be above 0 for rollouts: got {value}. "
            "Greedy sampling gives no policy gradient; 1.0 is usual."
        )
