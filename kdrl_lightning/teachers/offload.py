"""Offloads a frozen module: its weights stay on the CPU, and a device gets copies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdrl_lightning.rollout_batch import upload


class OffloadedWeights:
    """Keeps a frozen module's weights on the CPU and lends copies of them to a device.

    Nothing is copied back, because frozen weights do not change. On a machine with a GPU the
    weights on the CPU are pinned, so that a copy does not block the process.

    Args:
        module: the frozen module; its weights are on the CPU.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._masters = [(p, pinned(p.data)) for p in module.parameters()]  # tied ones once
        self._lent = False
        self.take_back()

    def lend(self, device: torch.device) -> None:
        """Copy the weights to a device, unless they are there already."""
        if self._lent:
            return
        self._lent = True
        for parameter, master in self._masters:
            parameter.data = fetched(master, device)
        self._move_buffers(device)

    def take_back(self) -> None:
        """Free the copies; the module has its weights on the CPU again."""
        self._lent = False
        for parameter, master in self._masters:
            parameter.data = master
        self._move_buffers(torch.device("cpu"))

    def _move_buffers(self, device: torch.device) -> None:
        """Move the buffers, which are small and may change, e.g. rotary frequencies."""
        for module in self._module.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = upload(buffer, device)


def fetched(master: Tensor, device: torch.device) -> Tensor:
    """Return a copy of a tensor on a device; work queued there later waits for it."""
    return master.to(device, non_blocking=True)


def pinned(tensor: Tensor) -> Tensor:
    """Return a tensor in pinned memory, if there is a GPU to copy it to."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor
