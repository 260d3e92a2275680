"""A full copy of a model on every rank, in the dtype that the trainer computes in."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from kdrl_lightning.common.untyped import HFModel
from kdrl_lightning.models.loading import empty_causal_lm
from kdrl_lightning.models.weights import ModelWeights, plain_name


@torch.no_grad()
def filled_replica(weights: ModelWeights, replica: HFModel = None) -> HFModel:
    """Return an unsharded copy of a model in its compute dtype; all ranks must call it.

    We gather one tensor at a time, so a rank holds the copy and at most one tensor twice.

    Args:
        weights: weights of the model.
        replica: an earlier copy to refresh; None builds one on this rank's device.

    Raises:
        RuntimeError: the copy has parameters that the model lacks.
    """
    if replica is None:
        dtype = weights.compute_dtype if weights.narrower else None
        replica = empty_causal_lm(weights.model, _device(weights), dtype)
    into = dict(replica.named_parameters(remove_duplicate=False))
    for name, tensor in weights.named_tensors(replica.dtype):
        into.pop(name).copy_(tensor)
    if into:
        raise RuntimeError(f"the sharded model has no weights for {sorted(into)} of its copy")
    for name, buffer in weights.model.named_buffers():
        replica.get_buffer(plain_name(name)).copy_(buffer)
    return replica


def _device(weights: ModelWeights) -> torch.device:
    if not weights.sharded:
        device: torch.device = next(weights.model.parameters()).device
        return device
    mesh = next(p.device_mesh for p in weights.model.parameters() if isinstance(p, DTensor))
    if mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(mesh.device_type)
