"""Methods that ``python -m kdrl_lightning serve`` adds to vLLM's worker.

The trainer calls them by ``/collective_rpc``. vLLM mixes the class into its worker, so this module
does not import vLLM.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from kdrl_lightning.engines.weight_files import read_shards

# `Any`: vLLM is optional, and type checkers skip it.

NAME = f"{__name__}.StudentWorker"


def before_reload(model: Any) -> None:
    """Make CPU kernels of experts pack the weights that arrive next, and name what loads them.

    vLLM packs weights only when it makes a kernel, and writes unpacked weights into it later. So we
    remove the kernel before a reload. A reload also asks for the name of every function that loads
    a weight; those of MiniMax M2 are partial functions, which have none.
    """
    for parameter in model.parameters():
        loader = getattr(parameter, "weight_loader", None)
        if isinstance(loader, partial) and not hasattr(loader, "__name__"):
            loader.__name__ = loader.func.__name__  # type: ignore[attr-defined]
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
        if method is not None and experts is not None and "CPU" in type(experts).__name__:
            method.moe_kernel = None
        give_group(getattr(module, "router", None))


def give_group(router: Any) -> None:
    """Make a CPU router of experts do what it only does for experts in groups (vLLM 0.32).

    Without groups it ignores its correction bias (Ernie 4.5) and refuses the scores of sigmoids
    (Laguna, MiniMax M2). One group of all experts makes the same choice with both.
    """
    if type(router).__name__ != "CPURouter" or router.use_grouped_topk:
        return
    biased = router.e_score_correction_bias is not None and router.scoring_func == "softmax"
    if router.custom_routing_function is None and (biased or router.scoring_func == "sigmoid"):
        router.use_grouped_topk, router.num_expert_group, router.topk_group = True, 1, 1


def after_reload(model: Any) -> None:
    """Make a CPU pack a head that is tied to the embedding, after the new weights have arrived.

    vLLM packs a weight only if it arrives under its name, and a folder names tied weights once.
    """
    modules = [m for m in model.modules() if isinstance(getattr(m, "weight", None), Tensor)]
    shared = Counter(id(module.weight) for module in modules)
    for module in modules:
        if shared[id(module.weight)] > 1 and module.weight.device.type == "cpu":
            method = getattr(module, "quant_method", None)
            if method is not None:
                method.process_weights_after_loading(module)


class StudentWorker:
    """Loads the student's weights from files, and reports which weights the server holds."""

    student_label = ""

    def load_student(self: Any, folder: str, label: str) -> dict[str, str]:
        """Load all safetensors files of a folder, one tensor at a time.

        Args:
            folder: a folder that ``write_shards`` wrote, on a file system that both sides share.
            label: name of these weights, which ``student`` returns from now on.

        Returns:
            The label, or under ``error`` what went wrong.
        """
        self.student_label = ""  # no label until all weights are there
        try:
            before_reload(self.get_model())
            self.reload_weights(weights_iterator=read_shards(Path(folder)))
            after_reload(self.get_model())
        except Exception as error:  # otherwise the server would only answer `500`
            return {"error": f"{type(error).__name__}: {error}"}
        self.student_label = label
        return {"label": label}

    def name_student(self: Any, label: str) -> dict[str, str]:
        """Set the label of weights that arrived in another way.

        Args:
            label: name of the weights; an empty text if the transfer begins now.
        """
        (after_reload if label else before_reload)(self.get_model())
        self.student_label = label
        return {"label": label}

    def student(self: Any) -> dict[str, str]:
        """Return the label of the weights, empty before the first, and the server's settings."""
        model = self.vllm_config.model_config
        return {
            "label": self.student_label,
            "architecture": model.hf_config.architectures[0],
            "vocab_size": str(model.hf_text_config.vocab_size),
            "max_model_len": str(model.max_model_len),
            "transfer": getattr(self.vllm_config.weight_transfer_config, "backend", ""),
            "dtype": str(model.dtype).removeprefix("torch."),
            "logprobs_mode": str(model.logprobs_mode),
            "implementation": type(self.get_model()).__name__,
        }
