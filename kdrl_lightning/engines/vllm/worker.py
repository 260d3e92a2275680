"""Methods that ``python -m kdrl_lightning serve`` adds to vLLM's worker.

The trainer calls them through ``/collective_rpc``. vLLM mixes the class into its worker, so this
module does not import vLLM.
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
    """Prepare vLLM's model for new weights: remove packed expert kernels, name weight loaders.

    On a CPU, vLLM packs expert weights only when it makes a kernel, and a reload would write
    unpacked weights into it. So we remove the kernel. A reload also reads ``__name__`` of every
    weight loader; those of MiniMax M2 are partial functions, which have none.
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
    """Put all experts of a CPU router into one group: vLLM 0.32 routes wrongly without groups.

    Without groups the router ignores its correction bias (Ernie 4.5) and refuses sigmoid scores
    (Laguna, MiniMax M2). With a single group it selects the right experts.
    """
    if type(router).__name__ != "CPURouter" or router.use_grouped_topk:
        return
    biased = router.e_score_correction_bias is not None and router.scoring_func == "softmax"
    if router.custom_routing_function is None and (biased or router.scoring_func == "sigmoid"):
        router.use_grouped_topk, router.num_expert_group, router.topk_group = True, 1, 1


def after_reload(model: Any) -> None:
    """Pack a tied head again on a CPU, after the new weights have arrived.

    vLLM packs a weight only if it arrives under its name, and tied weights are sent under one name.
    """
    modules = [m for m in model.modules() if isinstance(getattr(m, "weight", None), Tensor)]
    shared = Counter(id(module.weight) for module in modules)
    for module in modules:
        if shared[id(module.weight)] > 1 and module.weight.device.type == "cpu":
            method = getattr(module, "quant_method", None)
            if method is not None:
                method.process_weights_after_loading(module)


class StudentWorker:
    """Loads the student's weights, and reports which weights the server holds."""

    student_label = ""

    def load_student(self: Any, folder: str, label: str) -> dict[str, str]:
        """Load all safetensors files of a folder, one tensor at a time.

        Args:
            folder: a folder that ``write_shards`` wrote, on a file system that both sides share.
            label: name of these weights, which ``student`` returns from now on.

        Returns:
            The label, or the reason of a failure under ``error``.
        """
        self.student_label = ""  # no label until all weights arrived
        try:
            before_reload(self.get_model())
            self.reload_weights(weights_iterator=read_shards(Path(folder)))
            after_reload(self.get_model())
        except Exception as error:  # otherwise the server would only answer `500`
            return {"error": f"{type(error).__name__}: {error}"}
        self.student_label = label
        return {"label": label}

    def name_student(self: Any, label: str) -> dict[str, str]:
        """Set the label of weights that the transfer API sends.

        Args:
            label: name of the weights, after the transfer; "" before it.
        """
        (after_reload if label else before_reload)(self.get_model())
        self.student_label = label
        return {"label": label}

    def student(self: Any) -> dict[str, str]:
        """Return the label of the weights, "" before the first push, and the server's settings."""
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
