"""Sampling with vLLM inside the training process, one engine per rank.

vLLM is imported only when the engine starts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch

from kdrl_lightning.common.distributed import agree
from kdrl_lightning.engines.base import Completion, RolloutEngine, Sampling
from kdrl_lightning.engines.vllm.errors import failure
from kdrl_lightning.engines.vllm.hub_names import HubWeights
from kdrl_lightning.engines.vllm.options import implementation_of, options_of
from kdrl_lightning.engines.vllm.process import RunningEngine, close_running, undisturbed
from kdrl_lightning.engines.vllm.requests import (
    check_requests,
    completion,
    context_of,
    limits,
    warn_of_one_rotary,
)
from kdrl_lightning.engines.vllm.room import check_room
from kdrl_lightning.engines.vllm.transformers_classes import classes_kept
from kdrl_lightning.engines.vllm.worker import after_reload, before_reload
from kdrl_lightning.errors import ConfigurationError, TrainingStopped, require_count
from kdrl_lightning.models.end_tokens import as_ids
from kdrl_lightning.models.weights import ModelWeights

# `Any`: vLLM is optional, and type checkers skip it.

CPU_CACHE_BYTES = 512 << 20
CPU_SEQUENCES = 256
ASLEEP = -1
UNKNOWN = 1 << 29  # tokens: the context of a model that does not name one


class VLLMEngine(RolloutEngine):
    """Samples with vLLM in the training process, from a copy of the student's weights.

    Before each rollout, if the student has changed, the engine refreshes the copy and empties the
    prefix cache. Prompts and completions are passed as token ids; no text is tokenised again. The
    engine's log-probabilities differ from the trainer's by rounding (about 1e-5 in float32, 1e-2
    in bfloat16), so objectives apply importance weights unless you switch them off.

    Args:
        gpu_memory_utilization: fraction of the GPU's memory that the engine may use for weights and
            KV cache together, in (0, 1].
        max_model_len: longest prompt and completion together, in tokens; None: the longest of the
            run. If only some prompts are checked before it starts, this length follows from
            ``max_prompt_tokens``, or else from the model's context.
        dtype: dtype of the copy; ``auto`` is bfloat16 on a GPU and the student's dtype on a CPU.
        sleep: on a GPU, free weights and KV cache between rollouts, so that updates can use the
            memory.
        kv_cache_memory_bytes: size of the KV cache in bytes; None: what ``gpu_memory_utilization``
            leaves on a GPU, 512 MiB on a CPU.
        max_sequences: completions decoded at once; None: vLLM's default for the GPU (1024 on an
            H100), 256 on a CPU.
        enforce_eager: switch CUDA graphs off: faster start, slower sampling. No effect on a CPU.

    Raises:
        ConfigurationError: a value is out of its range, ``sleep`` is set without a GPU, or vLLM is
            not installed.
    """

    exact = False
    compared = True
    one_per_process = True
    context: int

    def __init__(
        self,
        gpu_memory_utilization: float = 0.4,
        max_model_len: int | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        sleep: bool = False,
        kv_cache_memory_bytes: int | None = None,
        max_sequences: int | None = None,
        enforce_eager: bool = False,
    ) -> None:
        if not 0.0 < gpu_memory_utilization <= 1.0:
            raise ConfigurationError(
                f"`gpu_memory_utilization` must be above 0 and at most 1: got "
                f"{gpu_memory_utilization}. Choose a part that leaves the trainer enough memory."
            )
        for name, value in {
            "max_model_len": max_model_len,
            "kv_cache_memory_bytes": kv_cache_memory_bytes,
            "max_sequences": max_sequences,
        }.items():
            if value is not None:
                require_count(name, value, 1, float("inf"))
        if sleep and not torch.cuda.is_available():
            raise ConfigurationError(
                "`sleep` must be false without a GPU: got true. Set it to false: vLLM cannot sleep "
                "on a CPU."
            )
        if importlib.util.find_spec("vllm") is None:
            raise ConfigurationError(
                "`rollout_engine` must be TransformersEngine if vLLM is not installed: got "
                "VLLMEngine. Install vLLM: pip install 'kdrl_lightning[vllm]'."
            )
        self.gpu_memory_utilization = gpu_memory_utilization
        self.max_model_len = max_model_len
        self.dtype_name = dtype
        self.sleep = sleep
        self.kv_cache_memory_bytes = kv_cache_memory_bytes
        self.max_sequences = max_sequences
        self.enforce_eager = enforce_eager
        self._llm: Any = None
        self._running: RunningEngine | None = None
        self._made_for: tuple[str, torch.dtype] | None = None
        self._vocab_size = self.context = 0
        self._longest: int | None = None
        self._ends: tuple[int, ...] = ()
        self._model: Any = None
        self._sampled = False
        self._options: dict[str, Any] = {}
        self._path = ""

    def prepare(self, path: str, longest: int, device: torch.device) -> None:
        """Take the longest row of the run as ``max_model_len``; see ``RolloutEngine.prepare``.

        Raises:
            ConfigurationError: ``sleep`` is set for a student on a CPU, or
                ``gpu_memory_utilization`` leaves no room for the student's weights.
        """
        self._longest = longest if longest < UNKNOWN else None
        if device.type == "cuda":
            context = self.max_model_len or longest
            share, cache = self.gpu_memory_utilization, self.kv_cache_memory_bytes
            check_room(path, self._type(device, torch.float32), context, cache, share, device)
        elif self.sleep:
            raise ConfigurationError(
                "`sleep` must be false for a student on a CPU: got true. Set it to false: vLLM "
                "sleeps on GPUs only."
            )

    def _type(self, device: torch.device, student: torch.dtype) -> torch.dtype:
        if self.dtype_name != "auto":
            return cast(torch.dtype, getattr(torch, self.dtype_name))
        return torch.bfloat16 if device.type == "cuda" else student

    def setup(
        self, weights: ModelWeights, eos_token_id: int | Sequence[int], pad_token_id: int
    ) -> None:
        """Start vLLM with random weights; a later call for the same model keeps it running.

        A process can run only one, so this closes any other. See ``RolloutEngine.setup``.

        Raises:
            ConfigurationError: vLLM cannot run this model here.
        """
        config = weights.model.config.get_text_config()
        self._ends, self._vocab_size = as_ids(eos_token_id), int(config.vocab_size)
        context = context_of(config, self.max_model_len or self._longest)
        weight = next(weights.model.parameters())
        on_gpu = weight.device.type == "cuda"
        self._options = options_of(config, on_gpu)
        self._options["model_impl"] = implementation_of(config.model_type)
        self.dtype = self._type(weight.device, weight.dtype)
        self._path = weights.path
        wanted = (weights.path, self.dtype)
        if self._llm is not None and self._made_for == wanted and context <= self.context:
            return
        self.context = context
        warn_of_one_rotary(weights.model, context)
        close_running()
        self._llm = self._start(weights.path, weight.device)
        self._made_for = wanted
        if self.sleep:
            self._llm.sleep(level=2)

    def update_weights(self, weights: ModelWeights, version: int) -> None:
        """Copy the student's weights, one tensor at a time, and empty the prefix cache.

        Raises:
            ConfigurationError: vLLM cannot load the weights of this model.
            TrainingStopped: vLLM fails to load them although it has sampled before.
        """
        tensors, reason = HubWeights(weights, self.dtype).tensors(), None
        try:
            with self._in_one_line("take the weights"):
                self._take(self._started(), tensors)
        except Exception as error:
            reason = error
            for _ in tensors:  # the other ranks still gather a sharded student with this one
                pass
        agree(reason)
        self.version = version

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[list[int]], sampling: Sampling
    ) -> list[list[Completion]]:
        """Sample completions; see ``RolloutEngine.generate``.

        Raises:
            ConfigurationError: vLLM cannot sample from this model.
            TrainingStopped: a prompt is empty, too long, or holds an unknown id, there are no
                weights yet, or vLLM fails although it has sampled before.
        """
        check_requests(prompts, sampling, self._vocab_size, self.context)
        llm = self._started()
        if self.version is None or self.version == ASLEEP:
            raise TrainingStopped(
                "the engine must have weights to sample from: got none. Call update_weights first."
            )
        from vllm import SamplingParams

        requests = [(p, s) for p, group in zip(prompts, seeds, strict=True) for s in group]
        parameters = [
            SamplingParams(
                temperature=sampling.temperature,
                seed=seed,
                max_tokens=sampling.max_tokens,
                logprobs=0,
                stop_token_ids=list(self._ends),
                ignore_eos=True,  # stop at the end tokens above, not at those of the model's files
                detokenize=False,
                **limits(sampling),
            )
            for _, seed in requests
        ]
        # Rollouts run under the trainer's autocast, which must not change vLLM's dtypes.
        no_autocast = torch.autocast(_device_type(), enabled=False)
        # After an error vLLM would wait for requests that never end.
        with self._in_one_line("sample", self.close), no_autocast:
            outputs = llm.generate(
                [{"prompt_token_ids": list(p)} for p, _ in requests], parameters, use_tqdm=False
            )
        self._sampled = True
        made = iter(outputs)
        return [[self._completion(next(made).outputs[0]) for _ in group] for group in seeds]

    def _take(self, llm: Any, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        if self.sleep:
            torch.cuda.empty_cache()
            llm.wake_up(tags=["weights"])
        if self._model is not None:
            before_reload(self._model)
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
        if self._model is not None:
            after_reload(self._model)
        if self.sleep:
            llm.wake_up(tags=["kv_cache"])
        # Its keys and values come from the old weights.
        if llm.reset_prefix_cache() is False:
            raise RuntimeError("the prefix cache is still in use")

    def release(self) -> None:
        """Free the GPU's memory for the updates, if ``sleep`` is on."""
        if self.sleep and self.version not in (None, ASLEEP):
            self._started().sleep(level=2)  # drops the weights; the next rollout pushes them again
            self.version = ASLEEP

    def _completion(self, output: Any) -> Completion:
        ids = list(output.token_ids)
        values = [step[token].logprob for token, step in zip(ids, output.logprobs, strict=True)]
        return completion(ids, values, self._ends)

    def close(self) -> None:
        """Stop vLLM and free its memory; see ``RolloutEngine.close``."""
        if self._running is not None:
            self._running.close()

    def _start(self, path: str, device: torch.device) -> Any:
        on_gpu, grouped = device.type == "cuda", torch.distributed.is_initialized()
        cache, most = self.kv_cache_memory_bytes, self.max_sequences
        if not on_gpu:
            cache, most = cache or CPU_CACHE_BYTES, most or CPU_SEQUENCES
        if most is not None:
            self._options["max_num_seqs"] = most
        whole = self._in_one_line("start")
        with whole, undisturbed(device) as launcher, classes_kept() as keep:
            from vllm import LLM

            llm: Any = LLM(
                model=path,
                dtype=str(self.dtype).removeprefix("torch."),
                load_format="dummy",  # the weights come from the trainer
                skip_tokenizer_init=True,
                generation_config="vllm",  # not the model's top-p, top-k and penalties
                logprobs_mode="processed_logprobs",
                max_model_len=self.context,
                gpu_memory_utilization=self.gpu_memory_utilization,
                kv_cache_memory_bytes=cache,
                enforce_eager=self.enforce_eager or not on_gpu,
                enable_sleep_mode=self.sleep,
                distributed_executor_backend=launcher,
                seed=0,
                **{"enable_prefix_caching": True, **self._options},
            )
            self._running = RunningEngine(llm, self, VLLMEngine._forget, not grouped)
            (self._model,) = llm.apply_model(lambda model: model)
            keep(self._model)
        return llm

    def _started(self) -> Any:
        if self._llm is None:
            raise TrainingStopped(
                "the engine must be running: got one whose vLLM has stopped. Resume the run from "
                "its last checkpoint."
            )
        return self._llm

    @contextmanager
    def _in_one_line(self, what: str, then: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Call ``then`` after an error of vLLM, and raise the error as one line."""
        try:
            yield
        except Exception as error:
            then()
            raise failure(error, what, self._path, self._sampled, _import_error) from error

    def _forget(self) -> None:
        self._llm = self._model = self._running = self._made_for = self.version = None


def _device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _import_error(architecture: str) -> Exception | None:
    """Import vLLM's code for an architecture; return the error, or None."""
    try:
        from vllm.model_executor.models import ModelRegistry

        ModelRegistry.models[architecture].load_model_cls()
    except Exception as error:
        return error
    return None
