"""SDFT: forward KL to a teacher that reads a demonstration, without the first tokens."""

from __future__ import annotations

from collections.abc import Sequence

from kdrl_lightning.common.untyped import PolicySetting
from kdrl_lightning.objectives.divergences import VocabularyKL
from kdrl_lightning.objectives.policy import PolicyObjective
from kdrl_lightning.objectives.selections import ExceptFirstTokens, Selection


class SDFT(PolicyObjective):
    """Self-Distillation Fine-Tuning: KL(teacher || student) without the first tokens (2601.19897).

    It is the full-vocabulary forward KL on the student's completions, divided by the number of
    tokens that it acts on. As published the teacher is a moving average of the student with a
    demonstration in its prompt. The teacher's opening phrases refer to the demonstration, so the
    first tokens are left out. Rewards are measured but do not enter the loss.

    Args:
        skip_tokens: tokens at a completion's start to leave out. Published: 3.
        jsd_beta: see ``VocabularyKL``. Published: 0.
        teacher_kl_coef: weight of the divergence, at least 0.
        kd_per_imitated_token: divide by the step's imitated tokens, whatever ``reduction`` is.
        selection: further rules for the tokens on which the teacher is imitated.
        policy: further settings of ``PolicyObjective``.
    """

    def __init__(
        self,
        skip_tokens: int = 3,
        jsd_beta: float = 0.0,
        teacher_kl_coef: float = 1.0,
        kd_per_imitated_token: bool = True,
        selection: Sequence[Selection] = (),
        **policy: PolicySetting,
    ) -> None:
        super().__init__(
            ratio=None,
            advantage=None,
            distill=VocabularyKL(teacher_kl_coef, jsd_beta, None, kd_per_imitated_token),
            selection=(ExceptFirstTokens(skip_tokens), *selection),
            **policy,
        )
