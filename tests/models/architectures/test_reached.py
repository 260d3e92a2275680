"""Parameters that text never reaches are frozen, so that ddp does not wait for their gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from helpers.odd_models import plain, with_cross_attention, with_images
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.architectures.reached import unreached
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.models.sharding import load_scorer
from kdrl_lightning.trainer.strategies import check_unreached


def test_a_vision_tower_is_frozen_and_all_else_gets_a_gradient(tmp_path: Path) -> None:
    scorer = load_scorer(with_images(tmp_path), torch.float32)
    frozen = {n for n, p in scorer.model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all("vision_tower" in name or "multi_modal_projector" in name for name in frozen)
    scorer.chosen.__wrapped__(scorer, [torch.arange(9)], [4])[0].sum().backward()
    for name, parameter in scorer.model.named_parameters():
        assert (parameter.grad is None) == (name in frozen), name
    check_unreached(DDPStrategy(), scorer.unreached)


@pytest.mark.parametrize("make", [plain])
def test_a_plain_model_is_trained_whole(make, tmp_path: Path) -> None:
    scorer = load_scorer(make(tmp_path), torch.float32)
    assert all(p.requires_grad for p in scorer.parameters())
    assert scorer.unreached == []


def test_what_a_layer_may_reach_stays_trainable_and_ddp_must_look_for_it(tmp_path: Path) -> None:
    scorer = load_scorer(with_cross_attention(tmp_path), torch.float32)
    assert scorer.unreached
    assert all("encoder_attn" in name for name in scorer.unreached)
    trained = {n for n, p in scorer.model.named_parameters() if p.requires_grad}
    assert set(scorer.unreached) <= trained
    words = (
        r"`strategy` must look for unused parameters if a model has some: got ddp, and model\.\S+ "
        r"and \d+ more get no gradient\. Use `--trainer\.strategy ddp_find_unused_parameters_true`"
    )
    with pytest.raises(ConfigurationError, match=words):
        check_unreached(DDPStrategy(), scorer.unreached)
    check_unreached(DDPStrategy(find_unused_parameters=True), scorer.unreached)
    check_unreached(SingleDeviceStrategy(), scorer.unreached)


def test_a_model_that_cannot_run_has_none(tmp_path: Path) -> None:
    model = load_causal_lm(plain(tmp_path))
    model.forward = None
    assert unreached(model) == set()
