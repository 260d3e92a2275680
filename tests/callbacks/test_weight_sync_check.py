"""WeightSyncCheck: how far the engine's log-probabilities may be from the trainer's."""

from __future__ import annotations

import pytest
import torch

from kdrl_lightning.callbacks import WeightSyncCheck
from kdrl_lightning.errors import ConfigurationError


@pytest.mark.parametrize(
    ("precision", "dtype", "bound"),
    [
        ("32-true", None, 0.001),
        ("64-true", torch.float32, 0.001),
        ("32-true", torch.bfloat16, 0.1),
        ("32-true", torch.float16, 0.1),
        ("bf16-mixed", None, 0.1),
        ("bf16-mixed", torch.float32, 0.1),
    ],
)
def test_the_bound_follows_the_coarser_side(
    precision: str, dtype: torch.dtype | None, bound: float
) -> None:
    assert WeightSyncCheck().bound(precision, dtype) == bound
    assert WeightSyncCheck(0.02).bound(precision, dtype) == 0.02


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"`max_mean_diff` must be at least 0: got -1"):
        WeightSyncCheck(-1.0)


def test_the_old_name_still_works() -> None:
    from kdrl_lightning import callbacks
    from kdrl_lightning.callbacks import weight_sync_check

    for module in (callbacks, weight_sync_check):
        with pytest.warns(FutureWarning, match="`WeightSync` is now `WeightSyncCheck`"):
            assert module.WeightSync is WeightSyncCheck
        with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
            _ = module.Nothing
