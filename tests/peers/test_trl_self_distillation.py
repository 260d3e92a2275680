"""SDPO's and SDFT's losses against TRL's."""

from __future__ import annotations

import pytest
import torch

from helpers.objective_steps import V, ready, step
from helpers.reference import close, normal
from kdrl_lightning import SDPO
from kdrl_lightning.losses import TokenScores, generalized_jsd

pytest.importorskip("trl")


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("k", [3, V])
def test_trl_computes_the_same_loss(alpha: float, k: int) -> None:
    """TRL adds the tail on request; its alpha is our ``jsd_beta``."""
    from trl.experimental.sdpo import loss_utils as trl

    batch = step(mixed=False)
    shape = batch.completion_ids.shape
    leaf, theirs = normal(*shape, V, seed=31).requires_grad_(), normal(*shape, V, seed=32)
    per_token = trl.compute_topk_self_distillation_loss(
        leaf,
        theirs,
        distillation_topk=k,
        distillation_alpha=alpha,
        distillation_add_tail=k < V,
    )
    rows = leaf.log_softmax(-1)
    chosen = rows.gather(-1, batch.completion_ids[..., None])[..., 0]
    weighted = trl.apply_importance_sampling_clipping(per_token, chosen, batch.old_logprobs, 2.0)
    mask = batch.loss_mask
    expected = torch.where(mask, weighted, 0.0).sum() / mask.sum()
    ids = leaf.detach().topk(k, -1).indices
    objective = SDPO(0.0, alpha, k)
    ready_batch = ready(
        objective,
        batch.replace(topk_ids=ids, teacher_topk_logprobs=theirs.log_softmax(-1).gather(-1, ids)),
    )
    scores = TokenScores(chosen, chosen.detach(), None, rows.gather(-1, ids))
    loss, _ = objective(ready_batch, scores)
    close(loss, expected.detach(), 1e-6 if k == V else 1e-10)
    found, wanted = (torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (loss, expected))
    close(found, wanted, 1e-6)


def test_trl_computes_the_same_full_vocabulary_loss() -> None:
    from trl.experimental.sdft import loss_utils as trl

    student_logits, teacher_logits = normal(7, V, seed=41), normal(7, V, seed=42)
    for alpha in (0.0, 0.5, 1.0):
        expected = trl.compute_full_logit_self_distillation_loss(
            student_logits, teacher_logits, distillation_alpha=alpha
        )
        close(generalized_jsd(student_logits, teacher_logits, alpha), expected)
