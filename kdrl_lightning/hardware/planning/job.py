"""The settings of a run that a plan needs besides the module: ranks, lengths, batches, engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kdrl_lightning.errors import ConfigurationError, require_between
from kdrl_lightning.rollout.settings import RolloutSettings

Strategy = Literal["single", "ddp", "fsdp2"]


@dataclass(frozen=True)
class Sampler:
    """The engine's settings that decide its memory on a trainer's GPU.

    Attributes:
        kind: ``transformers``, ``vllm`` or ``elsewhere`` (servers, or an engine that we cannot
            plan).
        max_sequences: completions decoded at once; None: the engine's default.
        max_cached_tokens: tokens in the transformers engine's KV cache; None: as many as fit.
        share: part of the GPU's memory that vLLM takes for weights and KV cache, in (0, 1].
        sleep: whether vLLM frees that part during updates.
        dtype: type of vLLM's weights and KV cache; ``auto`` is bfloat16 on a GPU.
        cache_bytes: size of vLLM's KV cache; None: what its part leaves.
        context: longest sequence that vLLM accepts; None: the model's limit.
    """

    kind: Literal["transformers", "vllm", "elsewhere"] = "transformers"
    max_sequences: int | None = None
    share: float = 0.4
    sleep: bool = False
    dtype: str = "auto"
    cache_bytes: float | None = None
    context: int | None = None
    max_cached_tokens: int | None = None


@dataclass(frozen=True)
class Job:
    """Settings of a run that decide its memory, besides those of the module.

    Attributes:
        rollout: how rollouts are sampled and used.
        sampler: the engine.
        ranks: number of processes, one per device.
        strategy: how ranks share the work.
        precision: the trainer's precision, e.g. ``bf16-mixed``.
        reduces_each: whether fsdp2 reduces gradients after every micro-batch, not once per step.
        on_gpu: whether to plan for GPUs, where AdamW works on lists of tensors (``foreach``).
        accumulate: micro-batches per optimizer step.
        clips: whether gradients are clipped.
        others: completions per prompt that the teacher adds.
        longest_prompt: tokens of the longest prompt.
        mean_completion: mean tokens of a completion, which only seconds depend on; None: half of
            ``max_tokens``.
        kept_checkpoints: number of checkpoints that stay on the disk.
        model_configs: files or folders with a ``config.json``, by the name of the model.
        teacher_prompt: tokens of the longest prompt that the teacher reads; None: computed from its
            template and context.
        teacher_tokens: the teacher's tokens per token of the student, if it has another tokenizer;
            None: counted with both tokenizers, or assumed.
        depth: number of layers to build the student with; None: all.
    """

    rollout: RolloutSettings = RolloutSettings()
    sampler: Sampler = Sampler()
    ranks: int = 1
    strategy: Strategy = "single"
    precision: str = "32-true"
    on_gpu: bool = True
    accumulate: int = 1
    clips: bool = False
    others: int = 0
    longest_prompt: int = 1024
    mean_completion: int | None = None
    kept_checkpoints: int = 1
    model_configs: Mapping[str, str] = field(default_factory=dict)
    depth: int | None = None
    reduces_each: bool = False
    teacher_prompt: int | None = None
    teacher_tokens: float | None = None

    def __post_init__(self) -> None:
        for name in ("ranks", "accumulate", "longest_prompt"):
            require_between(name, getattr(self, name), 1, float("inf"))
        unit = self.rollout.minibatches_per_rollout * self.ranks
        if self.rollout.prompts_per_rollout % unit:
            raise ConfigurationError(
                "`prompts_per_rollout` must be a multiple of minibatches_per_rollout * processes = "
                f"{unit}: got {self.rollout.prompts_per_rollout}. Set it to "
                f"{-(-self.rollout.prompts_per_rollout // unit) * unit}, or plan other `--gpus`."
            )
        if self.accumulate > self.rows:
            raise ConfigurationError(
                f"`accumulate_grad_batches` must be at most {self.rows}, the completions of one "
                f"optimizer step on one process: got {self.accumulate}. Lower it."
            )

    @property
    def mixed(self) -> bool:
        """Whether models compute in bfloat16 from float32 weights."""
        return self.precision == "bf16-mixed"

    @property
    def exact(self) -> bool:
        """Whether the engine's log-probabilities are the trainer's, see ``RolloutEngine.exact``."""
        return self.sampler.kind == "transformers" and not self.mixed

    @property
    def group(self) -> int:
        """Completions per prompt."""
        return self.rollout.group_size + self.others

    @property
    def rows(self) -> int:
        """Completions per optimizer step on one rank."""
        unit = self.rollout.minibatches_per_rollout * self.ranks
        return self.rollout.prompts_per_rollout // unit * self.group

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with the longest completion."""
        return self.longest_prompt + self.rollout.max_tokens

    @property
    def largest_micro_batch(self) -> int:
        """Tokens of the largest micro-batch, with prompts and completions of the full length.

        It is the configured limit, but at least one row, and at most what a step has if every other
        micro-batch has one completion. Without a limit, micro-batches have equal numbers of rows.
        """
        if self.rollout.max_tokens_per_micro_batch is None:
            return -(-self.rows // self.accumulate) * self.longest
        most = (self.rows - self.accumulate + 1) * self.longest
        return max(self.longest, min(most, self.rollout.max_tokens_per_micro_batch))

    @property
    def typical(self) -> int:
        """Tokens of a completion of mean length."""
        return self.mean_completion or max(1, self.rollout.max_tokens // 2)


# `Any` below: the parsed settings of a class, as jsonargparse gives them.
def sampler_of(engine: Any, on_gpu: bool) -> Sampler:
    """Return the settings of a configured engine that a plan needs.

    Args:
        engine: class and arguments; None is the transformers engine.
        on_gpu: whether to plan for GPUs; only there vLLM can sleep.
    """
    if engine is None:
        return Sampler()
    name = str(engine["class_path"]).rsplit(".", 1)[-1]
    given = dict(engine.get("init_args") or {})
    if name == "TransformersEngine":
        return Sampler(
            max_sequences=given.get("max_sequences"),
            max_cached_tokens=given.get("max_cached_tokens"),
        )
    if name != "VLLMEngine":
        return Sampler("elsewhere")
    return Sampler(
        "vllm",
        given.get("max_sequences"),
        given.get("gpu_memory_utilization", Sampler.share),
        given.get("sleep", False) and on_gpu,
        given.get("dtype", "auto"),
        given.get("kv_cache_memory_bytes"),
        given.get("max_model_len"),
    )
