"""Attention of one new token: the same as transformers' own, and only while sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kdrl_lightning.engines import decoding


class Layer(torch.nn.Module):
    """What transformers' function asks of an attention layer."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, True


def case(groups: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Queries as a model makes them, keys and values inside of wider room, one of other width."""
    draw = torch.Generator().manual_seed(groups)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    query = normal(5, 1, 2 * groups, 8).transpose(1, 2)
    return query, normal(5, 2, 20, 8)[:, :, :13], normal(5, 2, 20, 8)[:, :, :13]


def masks() -> dict[str, Any]:
    places = torch.arange(13) >= torch.tensor([0, 3, 12, 1, 5])[:, None]
    bools = places[:, None, None]
    return {"none": None, "bool": bools, "float": (~bools).double() * -1e9}


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("groups", [1, 3])
def test_it_is_what_transformers_gives(groups: int, kind: str, scaling: float | None) -> None:
    query, key, value = case(groups)
    expected, _ = sdpa_attention_forward(
        Layer(groups), query, key, value, masks()[kind], scaling=scaling
    )
    got = decoding.one_token(query, key, value, masks()[kind], scaling)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any) -> Any:
    return ALL_ATTENTION_FUNCTIONS["sdpa"](Layer(1), query, key, value, None, **settings)[0]


def test_it_is_used_for_one_query_inside_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    ours = decoding.one_token

    def note(query: torch.Tensor, *args: Any) -> torch.Tensor:
        used.append(query.shape[2])
        return ours(query, *args)

    monkeypatch.setattr(decoding, "one_token", note)
    query, key, value = case(1)
    bias = torch.randn(1, 2, 1, 13, dtype=torch.float64)
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with decoding.one_token_attention():
        call(query, key, value, sliding_window=None)
        assert used == [1]
        biased = call(query, key, value, position_bias=bias)
        call(query.expand(5, 2, 4, 8), key, value)
        call(*(part.bfloat16() for part in (query, key, value)))
        assert used == [1]
        # Some models name the mask, and one within another is no matter.
        with decoding.one_token_attention():
            ALL_ATTENTION_FUNCTIONS["sdpa"](Layer(1), query, key, value, attention_mask=None)
        ALL_ATTENTION_FUNCTIONS["sdpa"](Layer(1), query, key, value, attention_mask=None)
        assert used == [1] * 3
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before is sdpa_attention_forward
    assert (biased - call(query, key, value)).abs().max() > 0.01
    with pytest.raises(OSError), decoding.one_token_attention():
        raise OSError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_somebodys_own_attention_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(*_: Any, **__: Any) -> Any:
        return "own", None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", own)
    with decoding.one_token_attention():
        assert call(*case(1)) == "own"
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
