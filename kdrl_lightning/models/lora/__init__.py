"""Low-rank adapters (LoRA) on a frozen student, with peft."""

from kdrl_lightning.models.lora.adapters import (
    ADAPTER,
    LoRA,
    adapted_layers,
    adapter_weights,
    adapters_off,
    add_update,
    base_order,
    is_adapter,
    leave_base_out,
    save_adapters,
)

__all__ = [
    "ADAPTER",
    "LoRA",
    "adapted_layers",
    "adapter_weights",
    "adapters_off",
    "add_update",
    "base_order",
    "is_adapter",
    "leave_base_out",
    "save_adapters",
]
