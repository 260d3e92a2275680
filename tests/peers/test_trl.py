"""Our losses against TRL's: for the same inputs, loss and gradient must be the same.

TRL's trainers are real. The only stand-in is the model, which returns randomly drawn
log-probabilities, so everything computed from them is TRL's code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.reference import close, normal
from kdrl_lightning.losses import (
    chosen_logprobs,
    cispo_surrogate,
    clipped_surrogate,
    constant_length,
    forward_kl,
    generalized_jsd,
    importance_mask,
    importance_weights,
    k2,
    k3,
    reverse_kl,
    sequence_mean,
    sequence_surrogate,
    token_mean,
)
from kdrl_lightning.losses.advantages import group_relative
from kdrl_lightning.losses.logprobs import Head
from kdrl_lightning.rewards.base import Sample
from kdrl_lightning.rewards.length import LengthPenalty

trl: Any = pytest.importorskip("trl", reason="trl is not installed: pip install -e '.[peers]'")
# Its trainers import vLLM where it is installed, of whatever version; nothing here needs it.
import_utils: Any = import_module("trl.import_utils")
import_utils.is_vllm_available = lambda min_version=None: False

SEEDS = range(4)
PROMPTS, GROUP, LENGTH = 4, 4, 9
ROWS = PROMPTS * GROUP
FLOAT32 = 1e-5
MakeTrainer = Callable[..., Any]


@dataclass(frozen=True)
class Batch:
    """One step's tokens, float64 ``[B, T]``; ``mask`` is ragged and has holes."""

    logprobs: Tensor
    old: Tensor
    rollout: Tensor
    ref: Tensor
    advantages: Tensor
    mask: Tensor


class Scripted(torch.nn.Module):
    """A model that answers every batch with the same log-probabilities of its completions."""

    is_gradient_checkpointing = False

    def __init__(self, logprobs: Tensor) -> None:
        super().__init__()
        self.logprobs = logprobs

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        """TRL passes prompt and completion, and cuts the prompt off again."""
        prompt = input_ids.shape[1] - self.logprobs.shape[1]
        logprobs = F.pad(self.logprobs, (prompt, 0))
        return SimpleNamespace(log_probs=logprobs, entropy=torch.zeros_like(logprobs))


@pytest.fixture
def make_trainer(student_folder: str, tmp_path: Path) -> MakeTrainer:
    """``make_trainer(**GRPOConfig's options)``: a GRPO trainer that has never trained."""
    from datasets import Dataset

    def make(
        reward: Callable[..., list[float]] = lambda prompts, **_: [0.0] * len(prompts),
        rollout: Callable[..., dict[str, Any]] | None = None,
        **options: Any,
    ) -> Any:
        options = {
            "per_device_train_batch_size": ROWS,
            "num_generations": GROUP,
            "gradient_accumulation_steps": 1,
            "max_completion_length": 2 * LENGTH,
            # TRL's default multiplies the reference KL by the policy ratio; ours is the plain one.
            "use_bias_correction_kl": False,
        } | options
        trainer = trl.GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(student_folder),
            processing_class=AutoTokenizer.from_pretrained(student_folder),
            reward_funcs=reward,
            rollout_func=rollout,
            train_dataset=Dataset.from_dict({"prompt": ["1+1"]}),
            args=trl.GRPOConfig(
                output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options
            ),
        )
        # As Trainer.train() does.
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        return trainer

    return make


def draw(seed: int, spread: float = 0.5) -> Batch:
    """Log-probabilities that drift by ``spread`` from those at rollout time."""
    generator = torch.Generator().manual_seed(100 + seed)
    lengths = torch.randint(1, LENGTH + 1, (ROWS, 1), generator=generator)
    mask = torch.arange(LENGTH) < lengths
    mask[:, 1:] &= torch.rand(ROWS, LENGTH - 1, generator=generator) < 0.8
    old = -normal(ROWS, LENGTH, seed=seed).abs() - 0.05
    # TRL keeps the engine's log-probabilities in float32: these are such numbers.
    rollout = (old + normal(ROWS, LENGTH, seed=seed + 50, scale=0.5)).float().double()
    return Batch(
        logprobs=old + normal(ROWS, LENGTH, seed=seed + 10, scale=spread),
        old=old,
        rollout=rollout,
        ref=old + normal(ROWS, LENGTH, seed=seed + 20, scale=0.3),
        advantages=normal(ROWS, seed=seed + 30),
        mask=mask,
    )


def peer(trainer: Any, batch: Batch, **inputs: Any) -> tuple[Tensor, Tensor]:
    """TRL's loss and its gradient by the log-probabilities; ``inputs=None`` leaves one out."""
    leaf = batch.logprobs.clone().requires_grad_()
    given = {
        "prompt_ids": torch.ones(len(leaf), 2, dtype=torch.long),
        "prompt_mask": torch.ones(len(leaf), 2, dtype=torch.long),
        "completion_ids": torch.ones(leaf.shape, dtype=torch.long),
        "completion_mask": batch.mask.long(),
        "old_per_token_logps": batch.old,
        "ref_per_token_logps": batch.ref,
        "advantages": batch.advantages,
        "num_items_in_batch": batch.mask.sum(),
    } | inputs
    loss = trainer.compute_loss(Scripted(leaf), {k: v for k, v in given.items() if v is not None})
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def ours(loss_of: Callable[[Tensor], Tensor], batch: Batch) -> tuple[Tensor, Tensor]:
    """Our loss and its gradient by the log-probabilities."""
    leaf = batch.logprobs.clone().requires_grad_()
    loss = loss_of(leaf)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def agree(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tol: float = 1e-10) -> None:
    """Loss and gradient agree, and neither is trivially 0."""
    assert float(expected[0]) != 0.0
    assert expected[1].any()
    assert got[1].dtype == expected[1].dtype == torch.float64
    close(got[0], expected[0], tol)
    close(got[1], expected[1], tol)


def reduce(loss_type: str, per_token: Tensor, mask: Tensor) -> Tensor:
    """Our reduction of the name TRL gives it."""
    if loss_type == "grpo":
        return sequence_mean(per_token, mask, len(mask))
    if loss_type == "dr_grpo":
        return constant_length(per_token, mask, len(mask), length=2 * LENGTH)
    return token_mean(per_token, mask, int(mask.sum()))


def clipped(
    loss_type: str, batch: Batch, beta: float = 0.0, **bounds: float
) -> tuple[Tensor, Tensor]:
    """Our clipped surrogate, with a reference KL, reduced."""

    def loss(logprobs: Tensor) -> Tensor:
        per_token = clipped_surrogate(logprobs, batch.old, batch.advantages, **bounds)
        return reduce(loss_type, per_token + beta * k3(logprobs, batch.ref), batch.mask)

    return ours(loss, batch)


CLIPS = {
    "symmetric": {"clip_low": 0.2, "clip_high": 0.2},
    "higher": {"clip_low": 0.2, "clip_high": 0.28},
    "dual": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.5},
}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_clipped_surrogate(
    make_trainer: MakeTrainer, loss_type: str, beta: float, clip: str
) -> None:
    bounds = CLIPS[clip]
    trainer = make_trainer(
        loss_type=loss_type,
        beta=beta,
        epsilon=bounds["clip_low"],
        epsilon_high=bounds["clip_high"],
        # TRL clamps the ratio whatever the sign of A; above 1 + epsilon_high that is the same.
        delta=bounds.get("dual_clip"),
    )
    for seed in SEEDS:
        batch = draw(seed)
        agree(clipped(loss_type, batch, beta, **bounds), peer(trainer, batch))


def test_the_drawn_ratios_reach_every_bound() -> None:
    for seed in SEEDS:
        batch = draw(seed)
        ratio = (batch.logprobs - batch.old).exp()
        positive = (batch.advantages > 0)[:, None] & batch.mask
        negative = (batch.advantages < 0)[:, None] & batch.mask
        for where, beyond in (
            (positive, ratio > 1.28),
            (positive, ratio < 1.28),
            (negative, ratio < 0.8),
            (negative, (ratio > 0.8) & (ratio < 1.5)),
            (negative, ratio > 1.5),
        ):
            assert (where & beyond).any(), seed


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_advantages_per_token(make_trainer: MakeTrainer, loss_type: str) -> None:
    trainer = make_trainer(loss_type=loss_type, epsilon=0.2)
    for seed in SEEDS:
        batch = replace(draw(seed), advantages=normal(ROWS, LENGTH, seed=seed + 40))
        agree(clipped(loss_type, batch), peer(trainer, batch))


def test_first_step_without_old_logprobs(make_trainer: MakeTrainer) -> None:
    # TRL takes the detached log-probabilities themselves, we are given them: the ratio is 1.
    trainer = make_trainer(loss_type="dapo")
    for seed in SEEDS:
        batch = draw(seed, spread=0.0)
        agree(clipped("dapo", batch), peer(trainer, batch, old_per_token_logps=None))


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(("low", "high", "spread"), [(3e-4, 4e-4, 1e-3), (0.1, 0.15, 0.5)])
def test_sequence_surrogate(
    make_trainer: MakeTrainer, low: float, high: float, spread: float, beta: float
) -> None:
    trainer = make_trainer(
        loss_type="grpo",
        importance_sampling_level="sequence",
        epsilon=low,
        epsilon_high=high,
        beta=beta,
    )
    rows = []
    for seed in SEEDS:
        batch = draw(seed, spread)

        def loss(logprobs: Tensor, batch: Batch = batch) -> Tensor:
            per_token = sequence_surrogate(
                logprobs, batch.old, batch.advantages, batch.mask, low, high
            )
            return sequence_mean(per_token + beta * k3(logprobs, batch.ref), batch.mask, ROWS)

        expected = peer(trainer, batch)
        agree(ours(loss, batch), expected)
        rows.append((expected[1] != 0).any(1))
    if not beta:
        assert torch.cat(rows).any()
        assert not torch.cat(rows).all(), "no completion was clipped"


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_cispo(make_trainer: MakeTrainer, beta: float) -> None:
    # TRL's epsilon_high is the largest weight itself; ours, as in clipping, is the excess over 1.
    trainer = make_trainer(loss_type="cispo", epsilon_high=1.28, beta=beta)
    for seed in SEEDS:
        batch = draw(seed)

        def loss(logprobs: Tensor, batch: Batch = batch) -> Tensor:
            per_token = cispo_surrogate(logprobs, batch.old, batch.advantages, clip_high=0.28)
            per_token = per_token + beta * k3(logprobs, batch.ref)
            return token_mean(per_token, batch.mask, int(batch.mask.sum()))

        agree(ours(loss, batch), peer(trainer, batch))


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_a_step_in_micro_batches(make_trainer: MakeTrainer, loss_type: str) -> None:
    trainer = make_trainer(loss_type=loss_type, gradient_accumulation_steps=ROWS // 2)
    for seed in SEEDS:
        batch = draw(seed)
        parts = [
            Batch(*(getattr(batch, name)[rows] for name in Batch.__dataclass_fields__))
            for rows in (slice(i, i + 2) for i in range(0, ROWS, 2))
        ]
        shares = [peer(trainer, part, num_items_in_batch=batch.mask.sum()) for part in parts]
        expected = sum(s[0] for s in shares), torch.cat([s[1] for s in shares])
        agree(clipped(loss_type, batch), expected)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_a_completion_without_loss_tokens(make_trainer: MakeTrainer, loss_type: str) -> None:
    # TRL's mean over completions counts it with a loss of 0; our documented denominator are the
    # completions with at least one loss token. Given TRL's count, the shares are the same.
    trainer = make_trainer(loss_type=loss_type)
    for seed in SEEDS:
        batch = draw(seed)
        batch.mask[seed] = False
        agree(clipped(loss_type, batch), peer(trainer, batch))


def score(
    make_trainer: MakeTrainer, batch: Batch, rewards: list[float], **options: Any
) -> tuple[Any, dict[str, Tensor]]:
    """TRL's trainer after it has taken ``batch`` from an engine, and what it made of it."""
    mask = batch.mask.long().tolist()

    def rollout(prompts: list[str], _: Any) -> dict[str, Any]:
        return {
            "prompt_ids": [[1, 2]] * len(prompts),
            "completion_ids": [[3] * LENGTH] * len(prompts),
            "logprobs": batch.rollout.tolist(),
            "env_mask": mask,
        }

    trainer = make_trainer(lambda **_: rewards, rollout, **options)
    # Without vLLM the configuration would refuse it; its correction is what is wanted.
    trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step
    trainer.model = Scripted(batch.old)
    outputs = trainer._generate_and_score_completions([{"prompt": "1+1"}] * ROWS)
    close(outputs["old_per_token_logps"], batch.old)
    return trainer, outputs


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_corrected_reference_kl_has_the_gradient_of_k2(
    make_trainer: MakeTrainer, loss_type: str
) -> None:
    # TRL's default is rho k3, whose gradient at rho = 1 is -R: that of k2, as our docstrings say.
    trainer = make_trainer(loss_type=loss_type, beta=0.3, use_bias_correction_kl=True)
    for seed in SEEDS:
        batch = replace(draw(seed), advantages=torch.zeros(ROWS, dtype=torch.float64))
        value, gradient = peer(trainer, batch, old_per_token_logps=None)
        mean = partial(reduce, loss_type, mask=batch.mask)
        agree(
            (
                ours(lambda lp, b=batch, m=mean: m(0.3 * k3(lp, b.ref)), batch)[0],
                ours(lambda lp, b=batch, m=mean: m(0.3 * k2(lp, b.ref)), batch)[1],
            ),
            (value, gradient),
        )


def test_importance_weights(make_trainer: MakeTrainer) -> None:
    for seed in SEEDS:
        batch = draw(seed)
        trainer, outputs = score(
            make_trainer,
            batch,
            [0.0] * ROWS,
            vllm_importance_sampling_mode="token_truncate",
            vllm_importance_sampling_clip_max=1.5,
            beta=0.1,
            loss_type="dapo",
        )
        expected = outputs["importance_sampling_ratio"][batch.mask]
        weights = importance_weights(batch.old, batch.rollout, cap=1.5)
        assert expected.max() == 1.5
        close(weights[batch.mask], expected)

        def loss(logprobs: Tensor, batch: Batch = batch, weights: Tensor = weights) -> Tensor:
            per_token = weights * clipped_surrogate(logprobs, batch.old, batch.advantages)
            per_token = per_token + 0.1 * k3(logprobs, batch.ref)
            return token_mean(per_token, batch.mask, int(batch.mask.sum()))

        ratio = outputs["importance_sampling_ratio"]
        agree(ours(loss, batch), peer(trainer, batch, importance_sampling_ratio=ratio))


def test_importance_mask(make_trainer: MakeTrainer) -> None:
    for seed in SEEDS:
        batch = draw(seed)
        trainer, outputs = score(
            make_trainer,
            batch,
            [0.0] * ROWS,
            vllm_importance_sampling_mode="token_mask",
            vllm_importance_sampling_clip_min=0.7,
            vllm_importance_sampling_clip_max=1.5,
            loss_type="dapo",
        )
        ratio = outputs["importance_sampling_ratio"]
        kept = importance_mask(batch.old, batch.rollout, low=0.7, high=1.5)
        assert kept[batch.mask].any()
        assert not kept[batch.mask].all()
        assert torch.equal(kept[batch.mask], ratio[batch.mask] > 0)
        # TRL also weights the tokens it keeps, and divides by the dropped ones as well.
        weights = kept * importance_weights(batch.old, batch.rollout, cap=1.5)
        close(weights[batch.mask], ratio[batch.mask])

        def loss(logprobs: Tensor, batch: Batch = batch, weights: Tensor = weights) -> Tensor:
            per_token = weights * clipped_surrogate(logprobs, batch.old, batch.advantages)
            return token_mean(per_token, batch.mask, int(batch.mask.sum()))

        agree(ours(loss, batch), peer(trainer, batch, importance_sampling_ratio=ratio))


@pytest.mark.parametrize("scale", ["group", "none"])
def test_group_relative_advantages(make_trainer: MakeTrainer, scale: str) -> None:
    for seed in SEEDS:
        rewards = normal(PROMPTS, GROUP, seed=seed + 60).float()
        if seed:
            # A number whose mean is exact: TRL would divide a rounding residue by 1e-4, and ours is
            # exactly 0 in a group of equal rewards.
            rewards[seed] = 0.5
        _, outputs = score(
            make_trainer, draw(seed), rewards.flatten().tolist(), scale_rewards=scale
        )
        expected = outputs["advantages"].view(PROMPTS, GROUP)
        # TRL keeps rewards in float32; its eps is 1e-4, ours 1e-6 unless told otherwise.
        got = group_relative(rewards, scale_by_std=scale == "group", eps=1e-4)
        assert expected.any()
        close(got, expected, FLOAT32)


def test_a_whole_step(make_trainer: MakeTrainer) -> None:
    """From rewards and an engine's log-probabilities to the loss, each side on its own."""
    for seed in SEEDS:
        batch = draw(seed)
        rewards = normal(PROMPTS, GROUP, seed=seed + 60).float()
        trainer, outputs = score(
            make_trainer,
            batch,
            rewards.flatten().tolist(),
            vllm_importance_sampling_mode="token_truncate",
            vllm_importance_sampling_clip_max=1.5,
            loss_type="dapo",
            epsilon=0.2,
            epsilon_high=0.28,
            delta=1.5,
        )
        leaf = batch.logprobs.clone().requires_grad_()
        loss = trainer.compute_loss(Scripted(leaf), outputs)
        expected = loss.detach(), torch.autograd.grad(loss, leaf)[0]
        advantages = group_relative(rewards, eps=1e-4).flatten()
        weights = importance_weights(batch.old, batch.rollout, cap=1.5)

        def whole(
            logprobs: Tensor, b: Batch = batch, a: Tensor = advantages, w: Tensor = weights
        ) -> Tensor:
            per_token = clipped_surrogate(logprobs, b.old, a, 0.2, 0.28, dual_clip=1.5)
            return token_mean(w * per_token, b.mask, int(b.mask.sum()))

        # The advantages are float32 on both sides.
        agree(ours(whole, batch), expected, FLOAT32)


def logits(seed: int, vocab: int = 17) -> tuple[Tensor, Tensor]:
    """Student's and teacher's, far enough apart for the divergences to differ."""
    shape = (ROWS, LENGTH, vocab)
    return normal(*shape, seed=seed, scale=2.0), normal(*shape, seed=seed + 1, scale=2.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_generalized_jsd(beta: float, temperature: float) -> None:
    from trl.experimental.gkd import GKDTrainer

    ends = {0.0: forward_kl, 1.0: reverse_kl}
    for seed in SEEDS:
        student, teacher = logits(200 + seed)
        mask = draw(seed).mask
        labels = torch.zeros_like(mask, dtype=torch.long).masked_fill(~mask, -100)
        leaf = student.clone().requires_grad_()
        loss = GKDTrainer.generalized_jsd_loss(leaf, teacher, labels, beta, temperature)
        expected = loss.detach(), torch.autograd.grad(loss, leaf)[0]

        functions = [lambda s, t: generalized_jsd(s, t, beta)]
        functions += [ends[beta]] if beta in ends else []
        for function in functions:
            leaf = student.clone().requires_grad_()
            per_token = function(leaf / temperature, teacher / temperature)
            loss = token_mean(per_token, mask, int(mask.sum()))
            agree((loss.detach(), torch.autograd.grad(loss, leaf)[0]), expected)


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.25},
    "capped": {"bias": True, "scale": 2.0, "softcap": 3.0},
}


def head_values(seed: int, bias: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states ``[N, H]``, weight ``[V, H]`` and bias ``[V]``: float32 numbers."""
    hidden, weight = normal(23, 11, seed=seed), normal(19, 11, seed=seed + 1, scale=11**-0.5)
    return (
        hidden.float(),
        weight.float(),
        normal(19, seed=seed + 2, scale=0.5).float() if bias else None,
    )


def graded(
    function: Callable[..., tuple[Tensor, ...]],
    values: tuple[Tensor | None, ...],
    seed: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Outputs of ``function(*values)``, and its gradients for randomly drawn ones of them."""
    leaves = [None if v is None else v.to(dtype).requires_grad_() for v in values]
    outputs = function(*leaves)
    weights = [normal(len(x), seed=seed + i).float().to(dtype) for i, x in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, [x for x in leaves if x is not None], weights)
    return [x.detach() for x in (*outputs, *gradients)]


# TRL's two kernels below derive their gradients by hand, and compute in float32 whatever they are
# given. Ours takes the same float32 numbers in float64, so that all that is left is TRL's rounding.


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", HEADS)
def test_chosen_logprobs_and_entropy(kind: str, temperature: float) -> None:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    options = dict(HEADS[kind])
    bias = options.pop("bias", False)
    softcap, scale = options.get("softcap"), options.get("scale", 1.0)
    for seed in SEEDS:
        values = head_values(300 + 10 * seed, bias)
        ids = torch.randint(0, 19, (23,), generator=torch.Generator().manual_seed(seed))

        def theirs(*leaves: Tensor, ids: Tensor = ids) -> tuple[Tensor, ...]:
            return ChunkedLogProbFunction.apply(
                *leaves, ids, temperature, 7, softcap, scale, ("entropy",)
            )[:2]

        def mine(hidden: Tensor, *head: Tensor, ids: Tensor = ids) -> tuple[Tensor, ...]:
            return chosen_logprobs(hidden, Head(*head, **options), ids, temperature, chunk_size=5)

        expected = graded(theirs, values, seed, torch.float32)
        for got, want in zip(graded(mine, values, seed, torch.float64), expected, strict=True):
            assert want.any()
            close(got, want, FLOAT32)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", HEADS)
def test_divergence_of_two_heads(kind: str, beta: float) -> None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    temperature = 0.7
    options = dict(HEADS[kind])
    bias = options.pop("bias", False)
    softcap, scale = options.get("softcap"), options.get("scale", 1.0)
    for seed in SEEDS:
        values = head_values(300 + 10 * seed, bias)
        teacher = head_values(400 + 10 * seed, bias=True)

        def theirs(*leaves: Tensor, teacher: Any = teacher) -> tuple[Tensor, ...]:
            numbers = (beta, temperature, scale, softcap, 1.5, None)
            return ChunkedDivergenceFunction.apply(*leaves, *teacher, *numbers)[:1]

        def mine(hidden: Tensor, *head: Tensor, teacher: Any = teacher) -> tuple[Tensor, ...]:
            states, *other = (x.double() for x in teacher)
            logits = Head(*head, **options).logits(hidden) / temperature
            teacher_logits = Head(*other, scale=1.5).logits(states) / temperature
            return (generalized_jsd(logits, teacher_logits, beta),)

        expected = graded(theirs, values, seed, torch.float32)
        for got, want in zip(graded(mine, values, seed, torch.float64), expected, strict=True):
            assert want.any()
            close(got, want, FLOAT32)


@pytest.mark.parametrize(("limit", "buffer"), [(20, 5), (20, 20), (7, 1)])
def test_overlong_penalty(limit: int, buffer: int) -> None:
    from trl.rewards import get_soft_overlong_punishment

    completions = [[1] * n for n in range(limit + 4)]
    expected = get_soft_overlong_punishment(limit, buffer)(completions)
    penalty = LengthPenalty(max_tokens=limit, buffer_tokens=buffer)
    close([penalty(Sample("", ids, {})).reward for ids in completions], expected)
    assert {0.0, -1.0} <= set(expected)
