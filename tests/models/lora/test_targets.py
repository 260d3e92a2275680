"""Adapters are put on all layers that compute a linear map, whatever their class."""

from __future__ import annotations

import pytest
import torch

from helpers.small_models import build
from kdrl_lightning import LoRA
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.lora.targets import ALL, find_targets


@pytest.mark.filterwarnings("ignore:`target_modules. all-linear` leaves:UserWarning")
def test_a_linear_layer_that_maps_groups_has_no_adapter() -> None:
    model = build("deepseek_v4")
    ids = torch.arange(20)[None]
    before = model(input_ids=ids).logits
    targets = find_targets(model, ALL, 2)
    adapted = {path.rpartition(".")[2] for path in targets.modules}
    assert "o_a_proj" not in adapted and {"o_b_proj", "q_a_proj"} <= adapted
    LoRA(2).inject(model, 0)
    assert torch.equal(model(input_ids=ids).logits, before)
    words = r"`target_modules` must name linear layers .*: got o_a_proj\. Known: .*o_b_proj"
    with pytest.raises(ConfigurationError, match=words):
        LoRA(2, target_modules="o_a_proj").inject(build("deepseek_v4"), 0)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("falcon", "query_key_value"), ("llama4_text", "q_proj"), ("modernbert-decoder", "q_proj")],
)
def test_linear_layers_of_other_classes_and_places_have_one(name: str, layer: str) -> None:
    targets = find_targets(build(name), ALL, 2)
    assert any(path.endswith(layer) for path in targets.modules)
    assert not any("router" in path for path in (*targets.modules, *targets.parameters))
