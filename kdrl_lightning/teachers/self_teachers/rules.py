"""Which weights a self-teacher scores with, and how they follow the student's."""

from __future__ import annotations

from kdrl_lightning.errors import require_between, require_count


class WeightRule:
    """Which weights a self-teacher scores with.

    A teacher mixes the logits of the current student with those of *other* weights. The other
    weights are the initial student's, or they follow the student.

    Attributes:
        live_share: share of the current student's logits, in [0, 1]; 0 needs no pass of the
            student, 1 none of the other weights.
        kept: the other weights follow the student, so checkpoints hold them.
    """

    live_share: float = 0.0
    kept: bool = False

    def student_share(self, steps: int) -> float:
        """Return the student's share in the other weights after an optimizer step; 0: no change.

        Args:
            steps: optimizer steps so far, without those that were skipped.
        """
        return 0.0

    @property
    def is_student(self) -> bool:
        """Whether the teacher has the student's current weights in every rollout."""
        return self.live_share == 1.0 or (self.kept and self.student_share(1) == 1.0)


class InitialWeights(WeightRule):
    """The student before training; with LoRA its base model, without a second copy."""


class LiveWeights(WeightRule):
    """The current student, without gradient. It needs its own prompt to differ from the student."""

    live_share = 1.0


class MovingAverage(WeightRule):
    """An exponential moving average (EMA): ``kept <- (1 - a) kept + a student`` after each step.

    Steps that are skipped because of a non-finite gradient do not move it. It is kept in the dtype
    of the trained weights, which is float32 or wider. With LoRA the factors A and B are averaged,
    and the product of two averages is not the average of the products.

    SDPO (arXiv 2601.20802) uses 0.05 without and 0.01 with feedback. Other code sets the share of
    the *old* weights instead: a decay of 0.999 is ``student_weight: 0.001``.

    Args:
        student_weight: a, the share of the student's weights, in [0, 1]. 0 is ``InitialWeights``, 1
            is ``LiveWeights``.

    Raises:
        ConfigurationError: the share is out of its range.
    """

    kept = True

    def __init__(self, student_weight: float = 0.05) -> None:
        require_between("student_weight", student_weight, 0.0, 1.0, "Common are 0.01 to 0.05.")
        self.student_weight = student_weight

    def student_share(self, steps: int) -> float:
        """Return ``student_weight``."""
        return self.student_weight


class HardSync(WeightRule):
    """A copy of the student, refreshed every N optimizer steps.

    Skipped steps do not count. RLSD (arXiv 2604.03128) uses 10, CRISP (arXiv 2603.05433) 50.

    Args:
        every_n_steps: N, at least 1; 1 is ``LiveWeights``.

    Raises:
        ConfigurationError: N is out of its range.
    """

    kept = True

    def __init__(self, every_n_steps: int = 10) -> None:
        require_count("every_n_steps", every_n_steps, 1, float("inf"))
        self.every_n_steps = every_n_steps

    def student_share(self, steps: int) -> float:
        """Return 1 every N steps, else 0."""
        return float(steps % self.every_n_steps == 0)


class TrustRegion(WeightRule):
    """The normalised geometric mean of the initial and the current student's distributions.

    ``T`` is proportional to ``T_initial^(1 - a) T_current^a``: the logits are averaged at each
    token. This takes two forward passes, and it is SDPO's best teacher (arXiv 2601.20802).

    Args:
        student_weight: a, the share of the current student's logits, in [0, 1]. 0 is
            ``InitialWeights``, 1 is ``LiveWeights``.

    Raises:
        ConfigurationError: the share is out of its range.
    """

    def __init__(self, student_weight: float = 0.05) -> None:
        require_between("student_weight", student_weight, 0.0, 1.0, "1 is the current student.")
        self.student_weight = student_weight
        self.live_share = student_weight
