"""Rehearses a run with fake tensors: builds its models and takes its steps, on one rank.

The code that runs is that of training: ``KDRLModule.training_step``, scorers, objectives, FSDP2 and
the optimizer. Devices are CPUs to torch, whose attention keeps the same tensors as a GPU's flash
kernel.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import _disable_current_modes

from kdrl_lightning.engines.shared_heads import shared_heads_in_place
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses.logprobs import Head, TokenScores, auto_chunk_size, chosen_logprobs
from kdrl_lightning.models.architectures.attention import keep_soft_caps
from kdrl_lightning.models.architectures.experts import keep_precision
from kdrl_lightning.models.architectures.hidden_states import decoder_of
from kdrl_lightning.models.loading import frozen_names, model_path
from kdrl_lightning.models.lora import leave_base_out
from kdrl_lightning.models.prompt_cache import SPARE, growing_cache
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import Sharding, recompute_layers
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.module import KDRLModule
from kdrl_lightning.planning.job import Job
from kdrl_lightning.planning.meter import Meter, without_numbers
from kdrl_lightning.planning.shapes import config_of
from kdrl_lightning.rollout.updates import FROZEN_TOKENS
from kdrl_lightning.rollout_batch import RolloutBatch, collate
from kdrl_lightning.teachers.adapter_off import AdapterOffTeacher
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.local import LocalTeacher
from kdrl_lightning.trainer.optimizers import build_optimizer

WARM_UP = 2, 6, 6  # rows, tokens of a prompt, tokens of a completion
# A student of more layers is counted with fewer, unless its configuration says that they differ.
DEEP = 8
MIXED = ("first_k_dense_replace", "num_kv_shared_layers", "mlp_only_layers", "moe_layer_freq")


@dataclass(frozen=True)
class Cost:
    """What a phase takes on one rank.

    Attributes:
        peak: bytes above what was held before.
        kept: bytes that the forward pass keeps for the backward pass.
        flops: operations.
    """

    peak: int = 0
    kept: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Typical:
    """Operations of so many completions of mean length: to score them, and to train on them."""

    rows: int
    score: float
    update: float


@dataclass
class Rehearsal:
    """A run that is built but has no numbers.

    Attributes:
        job: settings.
        module: the module, with a student.
        meter: counts.
        optimizer: over the student's weights, with its moments.
        held: bytes by what holds them: ``student``, ``teacher``, ``reference``, ``moments``, and
            ``gradients``, which Lightning keeps from a step to the next one's backward pass.
        away: bytes of models that wait in the host's memory.
        known: costs of frozen models, which do not depend on the student's depth.
    """

    job: Job
    module: KDRLModule
    meter: Meter
    optimizer: torch.optim.Optimizer
    held: dict[str, int] = field(default_factory=dict)
    away: int = 0
    known: dict[Any, Cost] = field(default_factory=dict)

    @property
    def student(self) -> Scorer:
        """The student's scorer."""
        assert self.module.student is not None
        return self.module.student

    def update(self, tokens: int) -> Cost:
        """Take a micro-batch forward and backward, after others of the same step."""
        return self._update(self.filled(self._batch(tokens)))

    def _update(self, batch: RolloutBatch) -> Cost:
        self._make_gradients()
        before = self.meter.restart()
        with self._computing():
            out = self.module.training_step(batch, 0)
        kept = self.meter.bytes - before
        out["loss"].backward()
        cost = Cost(self.meter.peak - before, kept, self.meter.flops)
        del out
        self.module._found = {}
        self.optimizer.zero_grad()
        return cost

    def trained_flops(self, batch: RolloutBatch) -> int:
        """Return the operations of a filled micro-batch, forward and backward."""
        return self._update(batch).flops

    def _make_gradients(self) -> None:
        for parameter in self._trained():
            parameter.grad = torch.zeros_like(parameter)

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.student.parameters() if p.requires_grad]

    def score(self, tokens: int) -> dict[str, Cost]:
        """Score completions without gradient, as the rollout's start does, by each model."""
        wide = max(tokens, min(FROZEN_TOKENS, self.job.rows * self.job.longest))
        return self._score(self._batch(wide))

    def _score(self, wide: RolloutBatch) -> dict[str, Cost]:
        out = {}
        for name, work in (
            ("student", self.module.score),
            ("teacher", self.module.score_teacher),
            ("reference", self.module.score_reference),
        ):
            key = (name, *wide.input_ids.shape, *wide.completion_ids.shape)
            if key not in self.known:
                before = self.meter.restart()
                work(wide.replace(topk_ids=self._topk(wide)))
                cost = Cost(self.meter.peak - before, flops=self.meter.flops)
                if name == "student":
                    out[name] = cost
                    continue
                self.known[key] = cost
            out[name] = self.known[key]
        return out

    def typical(self) -> Typical:
        """Count the operations of completions of mean length, in a micro-batch of usual size."""
        job, settings = self.job, self.job.rollout
        length = job.longest_prompt // 2 + job.typical
        rows = max(1, min(job.rows, job.largest_micro_batch // length))
        shape = rows, max(1, job.longest_prompt // 2), job.typical
        batch = make_batch(*shape, job.group, self.rows_of_ids)
        scored = self.filled(batch)
        early = settings.minibatches_per_rollout - 1
        if settings.epochs_per_rollout > 1 or self.module.objective.reads_old_scores(scored):
            early += 1
        shares = {"student": early / settings.minibatches_per_rollout, "teacher": 1.0}
        if self.module.objective.divergence is not None:
            shares["teacher"] = 0.0  # it runs in the updates
        costs = self._score(batch)
        score = sum(cost.flops * shares.get(name, 1.0) for name, cost in costs.items())
        return Typical(rows, score, self.trained_flops(scored))

    def step(self) -> Cost:
        """Check, clip and apply gradients."""
        parameters = self._trained()
        self._make_gradients()
        before = self.meter.restart()
        self.module.nonfinite.check(parameters, 0.0, 0)
        if self.job.clips:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        peak = self.meter.peak - before
        self.optimizer.zero_grad()
        return Cost(peak)

    def push(self) -> Cost:
        """Read the student's weights as an engine takes them, one at a time."""
        before = self.meter.restart()
        for _ in ModelWeights(self.student.model, "").named_tensors():
            pass
        return Cost(self.meter.peak - before)

    def cache_values(self, tokens: int = 64) -> float:
        """Return how many numbers an engine's cache holds per token of a sequence."""
        cache = self._filled(self.whole_model(), torch.zeros(1, tokens, dtype=torch.long))
        parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        return float(sum(part.numel() for part in parts if part is not None) / tokens)

    def sample(self, rows: int) -> Cost:
        """Decode one token of so many completions that are nearly as long as they may be.

        This is the transformers engine. Its cache grows by a quarter whenever it is full.
        """
        job, model = self.job, self.whole_model()
        end = room = 0
        while room < job.longest - 1:
            end = max(room + 1, job.longest_prompt)
            room = end + SPARE + end // 4
        before = self.meter.restart()
        width = job.longest - 1
        cache = self._filled(model, torch.zeros(1, end, dtype=torch.long))
        self.meter.restart()  # without the pass over the prompt, which is one row here
        cache.batch_select_indices(torch.zeros(rows, dtype=torch.long))
        for layer in cache.layers:
            layer.keys, layer.values = (part[:, :, :width] for part in layer.room)
        ids = torch.zeros(rows, 1, dtype=torch.long)
        # Prompts of different lengths have a mask.
        mask = torch.ones(rows, width + 1, dtype=torch.long)
        attends = nullcontext() if job.on_gpu else shared_heads_in_place(model)
        with torch.no_grad(), self._computing(), attends:
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
            logits = logits.float()
            (logits - logits.amax(-1, keepdim=True)).exp().cumsum(-1, dtype=torch.float64)
        return Cost(self.meter.peak - before, flops=self.meter.flops)

    def _filled(self, model: Any, ids: Tensor) -> Any:
        cache = growing_cache(model.config.get_text_config())
        with torch.no_grad(), self._computing():
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def whole_model(self) -> Any:
        """Return the model that an engine of this rank samples from: the student, or a copy."""
        return plain_model(self.module, self.job) if self.student.sharded else self.student.model

    def whole_copy(self, itemsize: int | None = None) -> int:
        """Return bytes of all weights of the student on one device."""
        shapes = {id(p): p for n, p in self.student.model.named_parameters() if "lora_" not in n}
        return sum(p.numel() * (itemsize or p.element_size()) for p in shapes.values())

    @property
    def layers(self) -> int:
        """Layers of the student."""
        return int(self.student.model.config.get_text_config().num_hidden_layers)

    def head_chunk(self) -> int:
        """Return bytes of the head's tables for one chunk of logits, forward and backward."""
        weight = self.student.head().weight
        vocabulary, width = weight.shape
        rows = self.module.chunk_size or auto_chunk_size(vocabulary)
        dtype = torch.bfloat16 if self.job.precision == "bf16-mixed" else weight.dtype
        hidden = torch.zeros(rows, width, dtype=dtype).requires_grad_()
        table = torch.zeros(vocabulary, width, dtype=dtype)
        ids = torch.zeros(rows, dtype=torch.long)
        before = self.meter.restart()
        scores, entropy = chosen_logprobs(hidden, Head(table), ids, chunk_size=rows)
        (scores.sum() + entropy.sum()).backward()
        return self.meter.peak - before

    def checkpoint(self) -> int:
        """Return bytes of a checkpoint of all ranks: trained weights and their moments."""
        trained = [p for p in self.student.parameters() if p.requires_grad or not self.module.lora]
        state = [t for values in self.optimizer.state.values() for t in values.values()]
        tensors = [*trained, *(t for t in state if isinstance(t, Tensor))]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _computing(self) -> Any:
        return self.module.trainer.precision_plugin.forward_context()

    def _batch(self, tokens: int) -> RolloutBatch:
        """Return completions with so many tokens, as long as they may be."""
        job = self.job
        rows = max(1, tokens // job.longest)
        longest = tokens // rows
        prompt = min(job.longest_prompt, longest - 1)
        return make_batch(rows, prompt, longest - prompt, job.group, self.rows_of_ids)

    @property
    def rows_of_ids(self) -> int:
        """Ids are below this."""
        return int(self.student.head().weight.shape[0])

    def _topk(self, batch: RolloutBatch) -> Tensor | None:
        k = self.module.objective.top_k
        return torch.zeros(*batch.completion_ids.shape, k, dtype=torch.long) if k else None

    def filled(self, batch: RolloutBatch) -> RolloutBatch:
        """Fill what an update finds in its batch: real zeros, because only shapes count."""
        module, scores = self.module, torch.zeros(batch.completion_ids.shape)
        objective, top = module.objective, self._topk(batch)
        batch = batch.replace(
            old_logprobs=scores, old_entropy=scores, topk_ids=top, rollout_logprobs=scores
        )
        if objective.needs_reference:
            batch = batch.replace(ref_logprobs=scores)
        if module.teacher is not None and objective.divergence is None:
            wide = None if top is None else torch.zeros(top.shape)
            batch = batch.replace(
                teacher_logprobs=scores,
                teacher_entropy=scores,
                teacher_top_ids=batch.completion_ids,
                teacher_topk_logprobs=wide,
                teacher_tail_logprobs=None if wide is None else scores,
            )
        ready = module.prepare(_in_pairs(batch)).select(range(len(batch)))
        ready = ready.replace(group_ids=batch.group_ids)
        return ready.replace(totals=ready.count(self.job.rollout.max_tokens))


class Weightless(Teacher):
    """A teacher that is planned: its models have no numbers.

    Args:
        scorers: its models; the largest one scores. None: it scores elsewhere.
    """

    gives_states = True

    def __init__(self, scorers: list[Scorer]) -> None:
        self.scorers = scorers

    def prepare(self) -> None:
        """Do nothing."""

    def check(self, student_tokenizer: Any, student_path: str) -> None:
        """Do nothing."""

    def load(self, device: torch.device) -> None:
        """Do nothing."""

    @torch.no_grad()
    def score(self, batch: RolloutBatch, topk_ids: Tensor | None = None) -> TokenScores:
        """Score with the largest model."""
        if not self.scorers:
            zeros = torch.zeros(batch.completion_ids.shape)
            top = None if topk_ids is None else torch.zeros(topk_ids.shape)
            return TokenScores(zeros, zeros, batch.completion_ids[..., None], top, None, zeros)
        return self._largest().score(batch, top_k=1, topk_ids=topk_ids)

    @torch.no_grad()
    def states(self, batch: RolloutBatch) -> Any:
        """Return states and head of the largest model."""
        return self._largest().states(batch)

    def _largest(self) -> Scorer:
        return max(self.scorers, key=lambda s: sum(p.numel() for p in s.parameters()))


@contextmanager
def rehearse(module: KDRLModule, job: Job) -> Iterator[Rehearsal]:
    """Build a run without numbers, and take a first small step.

    Args:
        module: a module that is not set up; it is used up.
        job: the other settings.

    Raises:
        ConfigurationError: a configuration is not at hand, or a process group exists already.
    """
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        precision=job.precision,  # type: ignore[arg-type] # a text from the configuration
        accumulate_grad_batches=job.accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module.trainer = trainer
    shards = process_group(job.ranks) if job.strategy == "fsdp2" else nullcontext()
    with shards as mesh, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mixed = torch.bfloat16 if job.precision == "bf16-mixed" else None
        sharding = None if mesh is None else Sharding(mesh, mixed)
        with without_numbers() as meter:
            yield _built(module, job, meter, sharding)


def _built(module: KDRLModule, job: Job, meter: Meter, sharding: Sharding | None) -> Rehearsal:
    held: dict[str, int] = {}
    module.student = student_of(module, job, sharding)
    held["student"] = meter.bytes
    teacher, away = module.teacher, 0
    module.frozen.active = None
    if teacher is not None:
        kept = [t for t in local_teachers(teacher) if not t.offload]
        ready = [frozen_scorer(t, job, sharding) for t in kept]
        held["teacher"] = meter.bytes - sum(held.values())
        offloaded = [t for t in local_teachers(teacher) if t.offload]
        ready += [frozen_scorer(t, job, sharding) for t in offloaded]
        away = meter.bytes - sum(held.values())
        module.frozen.active = Weightless(ready)
        if isinstance(teacher, AdapterOffTeacher):
            module.frozen.active = teacher
            teacher.look_at(module.student, "")
    if module.objective.needs_reference:
        before = meter.bytes
        if module.lora is not None:
            reference: Teacher = AdapterOffTeacher()
            reference.look_at(module.student, "")
        else:
            source = LocalTeacher(module.student_source, "float32", chunk_size=module.chunk_size)
            reference = Weightless([frozen_scorer(source, job, sharding)])
        module.frozen.reference = reference
        held["reference"] = meter.bytes - before
    optimizer, _ = build_optimizer(
        list(module.student.parameters()), module.optimizer_callable, None
    )
    if job.on_gpu:
        work_on_lists(optimizer)
    run = Rehearsal(job, module, meter, optimizer, held, away)
    held["gradients"] = sum(local(p).numel() * p.element_size() for p in run._trained())
    if job.strategy == "ddp":  # a second copy of the gradients, from which it sends them
        held["ddp's buckets"] = held["gradients"]
    # The first pass fills torch's caches of shapes, whose tensors are no memory of the run.
    small = run.filled(make_batch(*WARM_UP, job.group, run.rows_of_ids))
    with run._computing():
        out = module.training_step(small, 0)
    out["loss"].backward()
    del out
    module._found = {}
    run.optimizer.zero_grad()
    before = meter.bytes
    run.step()
    held["moments"] = meter.bytes - before
    return run


def student_of(module: KDRLModule, job: Job, sharding: Sharding | None) -> Scorer:
    """Build the student as ``load_scorer`` does, without weights."""
    model = student_config_model(module, job)
    fixed = frozen_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in fixed)
    if module.lora is not None:
        with _disable_current_modes():
            module.lora.inject(model, 0)
    allot(model)
    scorer = Scorer(model, chunk_size=module.chunk_size)
    scorer.shares = may_share(scorer, sharding)
    if module.lora is not None:
        leave_base_out(scorer)
    if module.activation_checkpointing:
        recompute_layers(model)
    return scorer if sharding is None else sharding.shard(scorer)


def plain_model(module: KDRLModule, job: Job) -> Any:
    """Return the student's model without adapters, with weights that have no numbers."""
    return allot(student_config_model(module, job))


def student_config_model(module: KDRLModule, job: Job) -> Any:
    """Return the student's model on the ``meta`` device, as its configuration describes it."""
    double = torch.float64 if job.precision == "64-true" else torch.float32
    config = config_of(model_path(module.student_source), job.model_configs)
    if job.depth is not None:
        text = config.get_text_config()
        text.num_hidden_layers = job.depth
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: job.depth]
    return weightless(config, double)


def depth_of(module: KDRLModule, job: Job) -> int | None:
    """Return the number of a deep student's layers if they are all equal; else None."""
    config = config_of(model_path(module.student_source), job.model_configs).get_text_config()
    layers = int(getattr(config, "num_hidden_layers", 0))
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    mixed = any(getattr(config, name, None) for name in MIXED)
    return layers if layers > DEEP and len(kinds) == 1 and not mixed else None


def frozen_scorer(teacher: LocalTeacher, job: Job, sharding: Sharding | None) -> Scorer:
    """Build a teacher's scorer as it loads it, without weights."""
    config = config_of(model_path(teacher.model), job.model_configs)
    own = getattr(config, "dtype", None) or torch.float32
    chosen = own if teacher.dtype == "auto" else teacher.dtype
    dtype = chosen if isinstance(chosen, torch.dtype) else getattr(torch, chosen)
    model = allot(weightless(config, dtype).requires_grad_(False))
    scorer = Scorer(model, chunk_size=teacher.chunk_size)
    scorer.shares = may_share(scorer, sharding)
    return scorer if sharding is None else sharding.shard(scorer)


def weightless(config: Any, dtype: torch.dtype) -> Any:
    """Return a transformers model of a configuration on the ``meta`` device."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with _disable_current_modes(), no_init_weights(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    keep_soft_caps(model)
    keep_precision(model)
    return model.eval()


def allot(model: Any) -> Any:
    """Give a model on the ``meta`` device weights on the CPU that have no numbers; return it.

    ``nn.Module.to`` cannot swap fake tensors that something refers to.
    """
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for place in (module._parameters, module._buffers):
            for name, old in place.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.zeros(old.shape, dtype=old.dtype)
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, old.requires_grad)
                    made[id(old)] = new
                place[name] = made[id(old)]
    return model


def may_share(scorer: Scorer, sharding: Sharding | None) -> bool:
    """Return whether a plain decoder would run shared prompts once; ``verify`` needs numbers."""
    config = scorer.model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return sharding is None and decoder_of(scorer.model) is not None and kinds == {"full_attention"}


def local_teachers(teacher: Any) -> list[LocalTeacher]:
    """Return the teachers in this process that a teacher consists of."""
    if isinstance(teacher, LocalTeacher):
        return [teacher]
    inner = getattr(teacher, "teachers", None) or getattr(teacher, "teacher", None)
    parts = list(inner.values()) if isinstance(inner, dict) else inner
    parts = parts if isinstance(parts, list | tuple) else [parts] if parts is not None else []
    return [found for part in parts for found in local_teachers(part)]


def work_on_lists(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer work on lists of tensors, which torch does by itself on a GPU."""
    for group in optimizer.param_groups:
        if group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True


def make_batch(
    rows: int, prompt: int, completion: int, group: int, vocabulary: int
) -> RolloutBatch:
    """Return completions of one length, all different.

    Args:
        rows: number of completions.
        prompt: tokens of each prompt.
        completion: tokens of each completion.
        group: completions per prompt.
        vocabulary: ids are below it.
    """
    draw = torch.Generator().manual_seed(0)
    # Under `without_numbers`: integers are real.
    ids = torch.randint(0, vocabulary, (rows, completion), generator=draw)
    prompts = [[(3 + i // max(group, 1)) % vocabulary] * prompt for i in range(rows)]
    groups = [i // max(group, 1) for i in range(rows)]
    return collate(prompts, ids.tolist(), groups, pad_id=0)


def _in_pairs(batch: RolloutBatch) -> RolloutBatch:
    """Return each row twice, as a group whose rewards differ, for rules that compare a group."""
    rows = [*range(len(batch)), *range(len(batch))]
    return batch.select(rows).replace(
        group_ids=torch.tensor(rows),
        rewards=torch.tensor([float(i >= len(batch)) for i in range(len(rows))]),
    )


def local(tensor: Any) -> Tensor:
    """Return this rank's part of a tensor."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


@contextmanager
def process_group(ranks: int) -> Iterator[Any]:
    """Make a process group of so many ranks that sends nothing, and yield its mesh.

    Raises:
        ConfigurationError: this process is in a group already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ConfigurationError(
            "a plan for fsdp2 must be made outside of a process group: got one that exists. Plan "
            "in a process of its own."
        )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield init_device_mesh("cpu", (ranks,))
    finally:
        dist.destroy_process_group()
