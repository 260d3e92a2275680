"""Rehearses a run on fake tensors: builds its models and runs its steps, for one rank.

It runs the code of training: ``KDRLModule.training_step``, scorers, objectives, FSDP2 and the
optimizer. Tensors are on the CPU, where torch's attention keeps the same tensors as a GPU's flash
kernel. Models and caches of transformers are typed ``Any``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from kdrl_lightning.hardware.planning.batches import (
    joined_rows,
    make_batch,
    with_own_prompts,
    with_scores,
    zeros_of_ids,
)
from kdrl_lightning.hardware.planning.job import Job
from kdrl_lightning.hardware.planning.meter import Cost, Meter, Typical, without_numbers
from kdrl_lightning.hardware.planning.models import (
    chunk_of,
    frozen_scorer,
    largest_layer,
    process_group,
    reference_of,
    second_student,
    student_of,
    work_on_lists,
)
from kdrl_lightning.hardware.planning.teachers.own_prompts import (
    OwnPrompts,
    own_prompts_of,
    tokens_per_token,
)
from kdrl_lightning.hardware.planning.teachers.stand_ins import Stand, follows_student
from kdrl_lightning.losses.logprobs import Head, chosen_logprobs
from kdrl_lightning.models.scorer import Scorer
from kdrl_lightning.models.sharding import Sharding, local
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.module import KDRLModule
from kdrl_lightning.rollout_batch import RolloutBatch
from kdrl_lightning.teachers.local import LocalTeacher
from kdrl_lightning.trainer.optimizers import build_optimizer

WARM_UP = 2, 6, 6  # rows, tokens of a prompt, tokens of a completion


@dataclass
class Rehearsal:
    """A run that is built on fake tensors; its methods return the cost of each phase.

    Attributes:
        job: settings of the run.
        module: the module, with a student.
        meter: counts bytes and operations.
        optimizer: the optimizer of the student's weights, with its moments.
        held: bytes held in all phases, by part of the plan: ``student``, ``teacher``,
            ``reference``, ``moments``, ``ddp's buckets``, and ``gradients``, which Lightning keeps
            from a step until the next backward pass.
        away: bytes of models that are offloaded to the host's memory.
        frozen: scorers of the frozen models.
        own: the prompts that the teacher reads; None: the student's.
        known: costs of frozen models that do not depend on the student's depth.
    """

    job: Job
    module: KDRLModule
    meter: Meter
    optimizer: torch.optim.Optimizer
    held: dict[str, int] = field(default_factory=dict)
    away: int = 0
    frozen: list[Scorer] = field(default_factory=list)
    own: OwnPrompts | None = None
    known: dict[Any, Cost] = field(default_factory=dict)

    @property
    def student(self) -> Scorer:
        """The student's scorer."""
        assert self.module.student is not None
        return self.module.student

    def update(self, tokens: int) -> Cost:
        """Run a micro-batch forward and backward, after earlier ones of the same step."""
        return self._update(self.filled(self._batch(tokens)))

    def _update(self, batch: RolloutBatch) -> Cost:
        self._make_gradients()
        held, whole = self.meter.bytes, 0
        if self.student.sharded and self.job.accumulate > 1 and not self.job.reduces_each:
            self.optimizer.zero_grad()
            self._leave_whole_gradients()
            whole = self.meter.bytes - held
        before = self.meter.restart()
        with self.computing():
            out = self.module.training_step(batch, 0)
        kept = self.meter.bytes - before
        out["loss"].backward()
        cost = Cost(self.meter.peak - before, kept, self.meter.flops, whole)
        del out
        self.module._found = {}
        self.optimizer.zero_grad()
        return cost

    def _leave_whole_gradients(self) -> None:
        """Run a small micro-batch without reducing gradients, as before the last one of a step."""
        units = [m for m in self.student.modules() if isinstance(m, FSDPModule)]
        for unit in units:
            unit.set_requires_gradient_sync(False, recurse=False)
        self._small_backward()
        for unit in units:
            unit.set_requires_gradient_sync(True, recurse=False)

    def _small_backward(self) -> None:
        small = self.filled(self._made(*WARM_UP))
        with self.computing():
            out = self.module.training_step(small, 0)
        out["loss"].backward()
        self.module._found = {}

    def trained_flops(self, batch: RolloutBatch) -> int:
        """Return the operations of a filled micro-batch, forward and backward."""
        return self._update(batch).flops

    def _make_gradients(self) -> None:
        for parameter in self._trained():
            parameter.grad = torch.zeros_like(parameter)

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.student.parameters() if p.requires_grad]

    def score(self, tokens: int) -> dict[str, Cost]:
        """Return the cost of scoring without gradient at the start of a rollout, by model.

        A model that only scores during updates is left out.
        """
        batch = self._batch(tokens)
        shares = self.shares(batch)
        costs = self._score(batch, self._largest_read(batch, tokens), self._joined(batch, None))
        return {name: cost for name, cost in costs.items() if shares[name]}

    def _score(
        self, batch: RolloutBatch, reads: RolloutBatch, other: RolloutBatch
    ) -> dict[str, Cost]:
        """Return the cost of scoring with each model.

        Args:
            batch: the batch that the student scores.
            reads: the batch that the teacher scores.
            other: the batch that the reference scores.
        """
        frozen = self.module.frozen
        costs = {"student": self._cost(self.module.score, batch)}
        for name, model, work, read in (
            ("teacher", frozen.active, self.module.score_teacher, reads),
            ("reference", frozen.reference, self.module.score_reference, other),
        ):
            key = (name, *read.input_ids.shape, *read.completion_ids.shape)
            if key in self.known:
                costs[name] = self.known[key]
                continue
            costs[name] = self._cost(work, read)
            if not follows_student(model):
                self.known[key] = costs[name]
        return costs

    def _cost(self, work: Callable[[RolloutBatch], RolloutBatch], batch: RolloutBatch) -> Cost:
        before = self.meter.restart()
        work(batch.replace(topk_ids=zeros_of_ids(self.module.objective, batch)))
        return Cost(self.meter.peak - before, flops=self.meter.flops)

    def taught(self, batch: RolloutBatch) -> RolloutBatch:
        """Return the batch with the teacher's own prompts, if it has them."""
        if self.own is None:
            return batch
        return with_own_prompts(batch, self.own, self.job.longest_prompt, self.rows_of_ids)

    def _largest_read(self, batch: RolloutBatch, tokens: int) -> RolloutBatch:
        """Return the teacher's largest batch; ``max_tokens_per_micro_batch`` limits its tokens.

        Args:
            batch: the largest micro-batch.
            tokens: the limit, if the configuration has one.
        """
        own = self.own
        if own is None:
            return self._joined(batch, None)
        rows = len(batch)
        if self.job.rollout.max_tokens_per_micro_batch is not None:
            rows = max(1, tokens // own.length(batch.completion_ids.shape[1]))
        active = self.module.frozen.active
        if active is not None and active.aligns:  # it joins micro-batches, then cuts them
            wide = self._joined(self.taught(batch), own)
            return wide.select(range(min(rows, len(wide))))
        return self._joined(self.taught(batch.select(range(min(rows, len(batch))))), own)

    def _joined(self, batch: RolloutBatch, own: OwnPrompts | None) -> RolloutBatch:
        """Return a batch with as many rows as frozen models score in one pass."""
        rows = joined_rows(batch, own, self.job) if self.module.frozen.joins else len(batch)
        if rows == len(batch):
            return batch
        prompt, completion = int(batch.prompt_lengths.max()), batch.completion_ids.shape[1]
        wide = self._made(rows, prompt, completion)
        return wide if own is None else self.taught(wide)

    def typical(self) -> Typical:
        """Count the operations of completions of mean length, in a micro-batch of usual size."""
        job = self.job
        length = job.longest_prompt // 2 + job.typical
        rows = max(1, min(job.rows, job.largest_micro_batch // length))
        batch = self._made(rows, max(1, job.longest_prompt // 2), job.typical)
        costs, shares = self._score(batch, self.taught(batch), batch), self.shares(batch)
        score = sum(cost.flops * shares[name] for name, cost in costs.items())
        return Typical(rows, score, self.trained_flops(self.filled(batch)))

    def shares(self, batch: RolloutBatch) -> dict[str, float]:
        """Return the part of a rollout that each model scores before the updates.

        See ``RolloutSource._waits``: the updates give the other scores.
        """
        settings, objective = self.job.rollout, self.module.objective
        once = settings.epochs_per_rollout == 1
        waits = once and not objective.reads_old_scores(batch)
        runs_teacher = once and objective.divergence is not None
        teacher = 1.0 - (runs_teacher and not objective.reads_teacher_scores(batch))
        student = 1.0 - waits / settings.minibatches_per_rollout
        return {"student": student, "teacher": teacher, "reference": 1.0}

    def step(self) -> Cost:
        """Check, clip and apply gradients."""
        parameters = self._trained()
        self._make_gradients()
        before = self.meter.restart()
        self.module.nonfinite.check(parameters, 0.0, 0)
        if self.job.clips:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.module.frozen.follow(1)
        peak = self.meter.peak - before
        self.optimizer.zero_grad()
        return Cost(peak)

    def push(self, dtype: torch.dtype | None) -> Cost:
        """Read the student's weights as an engine of a type takes them, one at a time."""
        before = self.meter.restart()
        for _ in ModelWeights(self.student.model, "").named_tensors(dtype):
            pass
        return Cost(self.meter.peak - before)

    def whole_copy(self, itemsize: int | None = None) -> int:
        """Return the bytes of an unsharded student; ``itemsize``: bytes per weight, if changed."""
        shapes = {id(p): p for n, p in self.student.model.named_parameters() if "lora_" not in n}
        return sum(p.numel() * (itemsize or p.element_size()) for p in shapes.values())

    @property
    def layers(self) -> int:
        """Number of the student's layers."""
        return int(self.student.model.config.get_text_config().num_hidden_layers)

    def head_chunk(self) -> int:
        """Return bytes of the head's tables for one chunk of logits, forward and backward."""
        weight = self.student.head().weight
        vocabulary, width = weight.shape
        rows = chunk_of(self.module.chunk_size, vocabulary, self.job)
        dtype = torch.bfloat16 if self.job.mixed else weight.dtype
        hidden = torch.zeros(rows, width, dtype=dtype).requires_grad_()
        table = torch.zeros(vocabulary, width, dtype=dtype)
        ids = torch.zeros(rows, dtype=torch.long)
        before = self.meter.restart()
        scores, entropy = chosen_logprobs(hidden, Head(table), ids, chunk_size=rows)
        (scores.sum() + entropy.sum()).backward()
        return self.meter.peak - before

    def next_layer(self) -> int:
        """Return the bytes of the layer that FSDP2 prefetches on a GPU while another computes."""
        if not (self.student.sharded and self.job.on_gpu):
            return 0
        models = [self.student.model, *(scorer.model for scorer in self.frozen)]
        return max((largest_layer(model, self.job.mixed) for model in models), default=0)

    def second_table(self) -> int:
        """Return the bytes of a second table of logits, which only a compiled head needs."""
        vocabulary = self.rows_of_ids
        rows = chunk_of(self.module.chunk_size, vocabulary, self.job)
        return 4 * rows * vocabulary if self.job.on_gpu else 0

    def checkpoint(self) -> int:
        """Return the bytes of a checkpoint, all ranks together.

        It holds trained weights, their moments, and the weights that self-teachers keep.
        """
        trained = [p for p in self.student.parameters() if p.requires_grad or not self.module.lora]
        state = [t for values in self.optimizer.state.values() for t in values.values()]
        kept = [p for module in self.module.frozen.kept for p in module.parameters()]
        tensors = [*trained, *kept, *(t for t in state if isinstance(t, Tensor))]
        return sum(t.numel() * t.element_size() for t in tensors)

    def computing(self, plain: bool = False) -> Any:
        """Return the context manager of the trainer's precision; an empty one if ``plain``."""
        return nullcontext() if plain else self.module.trainer.precision_plugin.forward_context()

    def _batch(self, tokens: int) -> RolloutBatch:
        """Return a batch with about this number of tokens, in rows of the full length."""
        job = self.job
        rows = max(1, tokens // job.longest)
        longest = tokens // rows
        prompt = min(job.longest_prompt, longest - 1)
        return self._made(rows, prompt, longest - prompt)

    def _made(self, rows: int, prompt: int, completion: int) -> RolloutBatch:
        made = make_batch(rows, prompt, completion, self.job.group, self.rows_of_ids)
        return made.replace(engine_exact=self.job.exact)

    @property
    def rows_of_ids(self) -> int:
        """Number of rows of the head, an upper bound of token ids."""
        return int(self.student.head().weight.shape[0])

    def filled(self, batch: RolloutBatch) -> RolloutBatch:
        """Return a batch with all fields that an update reads."""
        return with_scores(self.taught(batch), self.module, self.job.rollout.max_tokens)


@contextmanager
def rehearse(module: KDRLModule, job: Job) -> Iterator[Rehearsal]:
    """Build a run on fake tensors, and take a first small step.

    Args:
        module: a module that is not set up; do not use it afterwards.
        job: the other settings.

    Raises:
        ConfigurationError: a model's configuration is missing, or a process group exists already.
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
        mixed = torch.bfloat16 if job.mixed else None
        sharding = None if mesh is None else Sharding(mesh, mixed)
        with without_numbers() as meter:
            yield _built(module, job, meter, sharding)


def _built(module: KDRLModule, job: Job, meter: Meter, sharding: Sharding | None) -> Rehearsal:
    held: dict[str, int] = {}
    module.student = student = student_of(module, job, sharding)
    held["student"] = meter.bytes
    share, _ = tokens_per_token(module, job)
    own = own_prompts_of(module, job, share)
    away: list[int] = []

    def frozen(teacher: LocalTeacher) -> Scorer:
        before = meter.bytes
        scorer = frozen_scorer(teacher, job, sharding)
        if teacher.offload and job.on_gpu:  # else it waits where everything else is
            away.append(meter.bytes - before)
        return scorer

    stand = Stand(student, frozen, lambda: second_student(module, job, sharding), share)
    module.frozen.choose(True, reference_of(module, job))
    for name, teacher in (("teacher", module.teacher), ("reference", module.frozen.reference)):
        before, waiting = meter.bytes, sum(away)
        made = None if teacher is None else stand.of(teacher)
        if made is not None:
            held[name] = meter.bytes - before - (sum(away) - waiting)
        setattr(module.frozen, "active" if name == "teacher" else name, made)
    optimizer, _ = build_optimizer(
        list(module.student.parameters()), module.optimizer_callable, None
    )
    if job.on_gpu:
        work_on_lists(optimizer)
    run = Rehearsal(job, module, meter, optimizer, held, sum(away), stand.models, own)
    held["gradients"] = sum(local(p).numel() * p.element_size() for p in run._trained())
    if job.strategy == "ddp":  # a second copy of the gradients, from which it sends them
        held["ddp's buckets"] = held["gradients"]
    # The first pass fills torch's caches, whose tensors are not part of the run's memory.
    run._small_backward()
    run.optimizer.zero_grad()
    before = meter.bytes
    run.step()
    held["moments"] = meter.bytes - before
    return run
