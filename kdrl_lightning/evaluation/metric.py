"""All metrics of one evaluation set, as a torchmetrics metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from kdrl_lightning.evaluation.bootstrap import bootstrap_interval
from kdrl_lightning.evaluation.majority import majority_at_k
from kdrl_lightning.evaluation.pass_at_k import pass_at_k

# `Any`: torchmetrics takes any other argument, and types its states as `Any`.


class EvaluationMetric(Metric):
    """Accuracy and its interval, pass@k, majority@k, reward, length and truncation of a set.

    The state is a table of all completions, with 48 bytes per completion. It is gathered over ranks
    and sorted by prompt, so that several ranks give the values of one process, bit for bit, and
    each prompt counts once.

    - ``accuracy``: pass@1, the mean over prompts of the share of right completions;
      ``accuracy_low``, ``accuracy_high``: its 95 % bootstrap interval over prompts.
    - ``pass_at_<k>``, ``majority_at_<k>`` for each k.
    - ``reward``, ``length_mean`` (tokens), ``truncated_frac``: means over completions;
      ``length_right`` and ``length_wrong`` if there are such completions.

    >>> metric = EvaluationMetric(ks=[2])
    >>> metric.add([0], *(torch.tensor([[1.0, 0.0]]) for _ in range(4)), torch.tensor([[0, 1]]))
    >>> float(metric.compute()["pass_at_2"]), float(metric.compute()["majority_at_2"])
    (1.0, 0.5)

    Args:
        ks: the values of k for pass@k and majority@k.
        seed: seed of the bootstrap.
        **kwargs: arguments of ``torchmetrics.Metric``.
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, ks: Sequence[int] = (), seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ks = tuple(ks)
        self.seed = seed
        self.add_state("rows", [], dist_reduce_fx="cat")

    def add(
        self,
        prompts: Sequence[int],
        correct: Tensor,
        rewards: Tensor,
        lengths: Tensor,
        truncated: Tensor,
        answers: Tensor,
    ) -> None:
        """Add P prompts with n completions each; P may be 0.

        Args:
            prompts: P row numbers in the set.
            correct: ``[P, n]`` bool.
            rewards: ``[P, n]``.
            lengths: ``[P, n]``, in tokens.
            truncated: ``[P, n]`` bool.
            answers: ``[P, n]``; equal numbers are equal answers of a prompt, -1 is no answer.
        """
        numbers = torch.tensor(list(prompts), device=correct.device)[:, None].expand_as(correct)
        columns = (numbers, correct, rewards, lengths, truncated, answers)
        self.update(torch.stack([c.double() for c in columns], -1))

    def update(self, rows: Tensor) -> None:
        """Add rows ``[P, n, 6]`` float64; call ``add``, which builds them.

        Raises:
            ValueError: ``rows`` has another shape.
        """
        if rows.dim() != 3 or rows.shape[2] != 6:
            raise ValueError(
                f"`rows` must have shape [P, n, 6]: got {list(rows.shape)}. Call `add` instead."
            )
        self.rows.append(rows)

    def compute(self) -> dict[str, Tensor]:
        """Return the values by name, as scalar tensors; an empty dict without prompts."""
        rows: Any = self.rows  # one tensor after torchmetrics' sync, a list before
        table = (rows if isinstance(rows, Tensor) else torch.cat(rows)).cpu()
        if not len(table):
            return {}
        table = table[table[:, 0, 0].argsort(stable=True)]
        correct, rewards, lengths, truncated, answers = table[..., 1:].unbind(-1)
        right, solved = correct.bool(), correct.mean(1)
        low, high = bootstrap_interval(solved, seed=self.seed)
        values = {
            "accuracy": float(solved.mean()),
            "accuracy_low": low,
            "accuracy_high": high,
            "reward": float(rewards.mean()),
            "length_mean": float(lengths.mean()),
            "truncated_frac": float(truncated.mean()),
        }
        for name, chosen in (("length_right", right), ("length_wrong", ~right)):
            if chosen.any():
                values[name] = float(lengths[chosen].mean())
        for k in self.ks:
            values[f"pass_at_{k}"] = float(pass_at_k(right, k).mean())
            values[f"majority_at_{k}"] = float(majority_at_k(answers.long(), right, k).mean())
        return {name: torch.tensor(value, device=self.device) for name, value in values.items()}
