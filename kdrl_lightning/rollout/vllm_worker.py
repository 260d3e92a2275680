"""What ``python -m kdrl_lightning serve`` adds to vLLM's worker, called by ``/collective_rpc``.

vLLM mixes the class into its worker; nothing here imports vLLM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdrl_lightning.rollout.weight_files import read_shards

NAME = f"{__name__}.StudentWorker"


def has_head(model: Any) -> bool:
    """Whether vLLM's model keeps a head apart from its embeddings, tied or not.

    A reload fills each by its name, even if they share memory while it samples.
    """
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    return "ParallelLMHead" in kinds


def ready_to_reload(model: Any) -> None:
    """Let a CPU's kernels of experts pack the weights that come next.

    vLLM packs them only when it makes the kernel, and lays plain weights into it afterwards.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
        if experts is not None and "CPU" in type(experts).__name__:
            method.moe_kernel = None


class StudentWorker:
    """Takes the student's weights from files, and says which ones it holds."""

    student_label = ""

    def load_student(self: Any, folder: str, label: str) -> dict[str, str]:
        """Load all safetensors files of a folder, one tensor at a time.

        Args:
            folder: written by ``write_shards``, on a file system that both sides see.
            label: what ``student`` returns from now on.
        """
        self.student_label = ""  # until all of it is there
        try:
            ready_to_reload(self.get_model())
            self.reload_weights(weights_iterator=read_shards(Path(folder)))
        except Exception as error:  # the server's own answer would only be `500`
            return {"error": f"{type(error).__name__}: {error}"}
        self.student_label = label
        return {"label": label}

    def name_student(self: Any, label: str) -> dict[str, str]:
        """Say which weights these are, where others brought them."""
        self.student_label = label
        return {"label": label}

    def student(self: Any) -> dict[str, str]:
        """Return the label of the weights, empty before the first, and what else must fit."""
        model = self.vllm_config.model_config
        return {
            "label": self.student_label,
            "architecture": model.hf_config.architectures[0],
            "vocab_size": str(model.hf_text_config.vocab_size),
            "max_model_len": str(model.max_model_len),
            "transfer": getattr(self.vllm_config.weight_transfer_config, "backend", ""),
            "dtype": str(model.dtype).removeprefix("torch."),
            "logprobs_mode": str(model.logprobs_mode),
            "tied_head": str(has_head(self.get_model())),
        }
