"""Breaks the maths of a copy of the package on purpose, and checks that the tests notice.

Run it as ``python tests/mutations.py``; with words, only mutations whose name contains one of them.
The real tree is never touched. Needs ``fork``, so that each run starts with torch loaded.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 120

DIVERGENCES = "losses/divergences.py", "losses/test_divergences.py"
POLICY = "losses/policy.py", "losses/test_policy.py"
REDUCTION = "losses/reduction.py", "losses/test_reduction.py"
LOGPROBS = "losses/logprobs.py", "losses/test_logprobs.py"
ADVANTAGES = "advantages.py", "test_advantages.py"
BASE = "objectives/base.py", "objectives/test_objectives.py"
DISTILL = "objectives/distillation.py", "objectives/test_objectives.py"
GRPO = "objectives/grpo.py", "objectives/test_objectives.py"
KDRL = "objectives/kdrl.py", "objectives/test_objectives.py"
RLAD = "objectives/rlad.py", "objectives/test_objectives.py"
TOTALS = "rollout_batch.py", "objectives/test_objectives.py"
RLAD_STATS = "objectives/rlad.py", "test_imitation_stats.py"
STATS = "callbacks/imitation_stats.py", "test_imitation_stats.py"
ANNEALING = "callbacks/kl_annealing.py", "test_kl_annealing.py"


class Mutation(NamedTuple):
    """One wrong edit: ``old`` occurs once in the file and becomes ``new``."""

    name: str
    where: tuple[str, str]
    old: str
    new: str


MUTATIONS = [
    Mutation("k1: sign", DIVERGENCES, "return logprobs - teacher", "return -logprobs + teacher"),
    Mutation("k2: half forgotten", DIVERGENCES, "return 0.5 * (teacher", "return (teacher"),
    Mutation(
        "k2: teacher attached",
        DIVERGENCES,
        "0.5 * (teacher_logprobs.detach() - logprobs)",
        "0.5 * (teacher_logprobs - logprobs)",
    ),
    Mutation(
        "k3: student and teacher swapped",
        DIVERGENCES,
        "gap = teacher_logprobs.detach() - logprobs",
        "gap = logprobs - teacher_logprobs.detach()",
    ),
    Mutation("k3: cancels near zero", DIVERGENCES, "gap.expm1() - gap", "gap.exp() - 1 - gap"),
    Mutation(
        "reverse KL: is forward KL",
        DIVERGENCES,
        "_kl(student_logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1))",
        "_kl(teacher_logits.detach().log_softmax(-1), student_logits.log_softmax(-1))",
    ),
    Mutation(
        "forward KL: is a cross-entropy",
        DIVERGENCES,
        "_kl(teacher_logits.detach().log_softmax(-1), student_logits.log_softmax(-1))",
        "-(teacher_logits.detach().softmax(-1) * student_logits.log_softmax(-1)).sum(-1)",
    ),
    Mutation(
        "KL: 0 times inf",
        DIVERGENCES,
        "torch.where(log_p > -torch.inf, log_p - log_q, 0.0)",
        "log_p - log_q",
    ),
    Mutation(
        "surrogate: ratio upside down",
        POLICY,
        "_clipped(logprobs - old_logprobs.detach()",
        "_clipped(old_logprobs.detach() - logprobs",
    ),
    Mutation("surrogate: sign", POLICY, "return -advantages *", "return advantages *"),
    Mutation(
        "surrogate: old attached",
        POLICY,
        "_clipped(logprobs - old_logprobs.detach()",
        "_clipped(logprobs - old_logprobs",
    ),
    Mutation(
        "surrogate: advantages attached",
        POLICY,
        "advantages = advantages.detach()",
        "advantages = advantages * 1",
    ),
    Mutation(
        "surrogate: clip sides swapped",
        POLICY,
        "advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:",
        "advantages: Tensor, clip_high: float, clip_low: float) -> Tensor:",
    ),
    Mutation(
        "surrogate: fence in float32",
        POLICY,
        "torch.where(advantages < 0, low, high)",
        "torch.where(advantages < 0, low, high).float().to(log_ratio)",
    ),
    Mutation(
        "surrogate: max for min",
        POLICY,
        "dead = torch.where(advantages < 0, log_ratio < fence, log_ratio > fence)",
        "dead = torch.where(advantages < 0, log_ratio > fence, log_ratio < fence)",
    ),
    Mutation(
        "surrogate: both fences act",
        POLICY,
        "dead = torch.where(advantages < 0, log_ratio < fence, log_ratio > fence)",
        "dead = (log_ratio < low) | (log_ratio > high)",
    ),
    Mutation(
        "surrogate: the fence is lifted", POLICY, "torch.where(dead, fence, log_ratio)", "log_ratio"
    ),
    Mutation(
        "TRRD: ends of alpha swapped", POLICY, "(1.0 - trrd_alpha) * offset", "trrd_alpha * offset"
    ),
    Mutation(
        "TRRD: offset upside down",
        POLICY,
        "(old_logprobs - teacher_logprobs).detach()",
        "(teacher_logprobs - old_logprobs).detach()",
    ),
    Mutation(
        "TRRD: student in the detached offset",
        POLICY,
        "(old_logprobs - teacher_logprobs).detach()",
        "(logprobs - teacher_logprobs).detach()",
    ),
    Mutation(
        "TRRD: student in the clamped offset",
        POLICY,
        "return log_rho + (1.0 - trrd_alpha) * offset",
        "gap = logprobs - teacher_logprobs.detach()\n"
        "    gap = gap if offset_clamp is None else gap.clamp(-offset_clamp, offset_clamp)\n"
        "    return trrd_alpha * log_rho + (1.0 - trrd_alpha) * gap",
    ),
    Mutation(
        "TRRD: teacher attached",
        POLICY,
        "(old_logprobs - teacher_logprobs).detach()",
        "old_logprobs.detach() - teacher_logprobs",
    ),
    Mutation(
        "TRRD: clamp one-sided", POLICY, ".clamp(-offset_clamp, offset_clamp)", ".clamp(max=1.0)"
    ),
    Mutation(
        "advantages: ddof 0",
        ADVANTAGES,
        "rewards.std(1, keepdim=True)",
        "rewards.std(1, correction=0, keepdim=True)",
    ),
    Mutation(
        "advantages: std of the whole batch",
        ADVANTAGES,
        "rewards.std(1, keepdim=True)",
        "rewards.std()",
    ),
    Mutation(
        "advantages: residue of equal rewards",
        ADVANTAGES,
        "return advantages.masked_fill(constant, 0.0)",
        "return advantages",
    ),
    Mutation("reduction: mask by product", REDUCTION, ".masked_fill(mask == 0, 0.0)", " * mask"),
    Mutation(
        "token mean: own tokens",
        REDUCTION,
        "_masked(per_token, mask).sum() / _at_least_one(num_loss_tokens)",
        "_masked(per_token, mask).sum() / _at_least_one((mask != 0).sum())",
    ),
    Mutation(
        "sequence mean: padded length",
        REDUCTION,
        "lengths = (mask != 0).sum(1).clamp(min=1)",
        "lengths = mask.shape[1]",
    ),
    Mutation(
        "sequence mean: own completions",
        REDUCTION,
        "/ lengths).sum() / _at_least_one(num_completions)",
        "/ lengths).sum() / mask.shape[0]",
    ),
    Mutation(
        "constant length: left out", REDUCTION, "(num_completions) * length)", "(num_completions))"
    ),
    Mutation(
        "group mean: completion's own tokens",
        REDUCTION,
        "/ group_tokens.clamp(min=1)",
        "/ (mask != 0).sum(1).clamp(min=1)",
    ),
    Mutation("log-probs: temperature multiplies", LOGPROBS, ") / temperature", ") * temperature"),
    Mutation(
        "log-probs: temperature before the soft cap",
        LOGPROBS,
        "head.logits(hidden) / temperature",
        "head.logits(hidden / temperature)",
    ),
    Mutation(
        "log-probs: padding rows count", LOGPROBS, "slice(None, self.vocab_size)", "slice(None)"
    ),
    Mutation("log-probs: bias forgotten", LOGPROBS, "self.bias[rows])", "None)"),
    Mutation("log-probs: entropy's sign", LOGPROBS, "log_norm - expected", "expected - log_norm"),
    Mutation(
        "log-probs: one chunk", LOGPROBS, "hidden.split(size), ids.split(size)", "[hidden], [ids]"
    ),
    Mutation(
        "log-probs: chunks kept for backward",
        LOGPROBS,
        "if torch.is_grad_enabled()",
        "if False",
    ),
    Mutation("term: mask replaces the loss mask", BASE, "batch.loss_mask & term.mask", "term.mask"),
    Mutation("term: mask ignored", BASE, "batch.loss_mask & term.mask", "batch.loss_mask"),
    Mutation(
        "term: divided by its own tokens",
        BASE,
        "term.per_token * mask.sum(1, keepdim=True) / weights",
        "term.per_token",
    ),
    Mutation("term: coefficient forgotten", BASE, "term.coef * shares[", "shares["),
    Mutation("entropy: punished", BASE, '"entropy", -scores', '"entropy", scores'),
    Mutation(
        "values outside the loss stay",
        BASE,
        "out = ~batch.loss_mask",
        "out = batch.loss_mask & False",
    ),
    Mutation(
        "KD: ratio attached",
        DISTILL,
        "(scores.logprobs - old).detach().exp()",
        "(scores.logprobs - old).exp()",
    ),
    Mutation(
        "KD: ratio upside down",
        DISTILL,
        "(scores.logprobs - old).detach().exp()",
        "(old - scores.logprobs).detach().exp()",
    ),
    Mutation(
        "KD: teacher read where nothing is imitated",
        DISTILL,
        "torch.where(mask, teacher, scores.logprobs.detach())",
        "teacher",
    ),
    Mutation("GRPO: division by std forced", GRPO, "(rewards, self.scale_by_std)", "(rewards)"),
    Mutation(
        "GRPO: groups out of order",
        GRPO,
        "advantages[order] = group_rel",
        "advantages[:] = group_rel",
    ),
    Mutation(
        "KDRL: KL subtracted",
        KDRL,
        "per_token, self.teacher_kl_coef",
        "per_token, -self.teacher_kl_coef",
    ),
    Mutation(
        "RLAD: clip sides swapped",
        RLAD,
        "self.clip_low,\n                self.clip_high,\n                self.offset",
        "self.clip_high,\n                self.clip_low,\n                self.offset",
    ),
    Mutation("RLAD: clamp ignored", RLAD, "self.offset_clamp,\n            ),", "),"),
    Mutation(
        "statistics: a fenced token counts",
        RLAD_STATS,
        "(advantages > 0) & (ratio < 1 + self.clip_high)",
        "(advantages > 0)",
    ),
    Mutation(
        "statistics: dead sides swapped",
        STATS,
        "above, below = ratio > 1 + clip_high, ratio < 1 - clip_low",
        "below, above = ratio > 1 + clip_high, ratio < 1 - clip_low",
    ),
    Mutation(
        "statistics: agreement for conflict", STATS, "gap * advantages > 0", "gap * advantages < 0"
    ),
    Mutation("statistics: correct for wrong", STATS, "mask & ~correct", "mask & correct"),
    Mutation(
        "totals: empty completions count",
        TOTALS,
        "used = self.loss_mask.any(1)",
        "used = self.completion_mask.any(1)",
    ),
    Mutation(
        "totals: left-out tokens count for the group",
        TOTALS,
        "index_add_(0, groups, loss_mask",
        "index_add_(0, groups, mask",
    ),
    Mutation("annealing: rises", ANNEALING, "self.start - self.dec", "self.start + self.dec"),
    Mutation("annealing: no floor", ANNEALING, "return max(self.start", "return min(self.start"),
]


def main(words: list[str]) -> int:
    """Print a table of all mutations; 1 if one survives, is out of date, or nothing passes."""
    _preload()
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = _copy(Path(folder))
        wanted = [m for m in MUTATIONS if not words or any(w in m.name for w in words)]
        for tests in sorted({m.where[1] for m in wanted}):
            verdict, seconds = _run(copy, tests)
            print(f"{'unbroken: ' + tests:48} {verdict:10} {seconds:5.1f} s", flush=True)
            survived += verdict != "passed"
        for mutation in wanted:
            verdict, seconds = _try(copy, mutation)
            by = _killer(copy) if verdict == "killed" else ""
            print(f"{mutation.name:48} {verdict:10} {seconds:5.1f} s  {by}", flush=True)
            survived += verdict != "killed"
    print(f"{len(wanted)} mutations, {survived} problems")
    return int(survived > 0)


def _preload() -> None:
    os.environ.pop("PYTEST_ADDOPTS", None)
    os.environ["COLUMNS"] = "300"  # room for the reason of a failure in pytest's summary
    sys.dont_write_bytecode = True  # two edits within a second can share a stale .pyc
    import hypothesis.strategies  # noqa: F401
    import lightning.pytorch  # noqa: F401
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)


def _copy(folder: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kdrl_lightning", folder / "kdrl_lightning", ignore=ignore)
    shutil.copytree(
        ROOT / "tests",
        folder / "tests",
        ignore=shutil.ignore_patterns("__pycache__", "conftest.py"),
    )
    (folder / "tests" / "conftest.py").write_text("")
    (folder / "pytest.ini").write_text("[pytest]\n")
    return folder


def _try(copy: Path, mutation: Mutation) -> tuple[str, float]:
    source, tests = mutation.where
    path = copy / "kdrl_lightning" / source
    text = path.read_text()
    if text.count(mutation.old) != 1:
        return f"stale: text occurs {text.count(mutation.old)} times", 0.0
    path.write_text(text.replace(mutation.old, mutation.new))
    verdict, seconds = _run(copy, tests)
    path.write_text(text)
    return {"passed": "SURVIVED", "failed": "killed"}.get(verdict, verdict), seconds


def _killer(copy: Path) -> str:
    """Name the failing test and what it raised."""
    lines = (copy / "output.txt").read_text().splitlines()
    line = next((x for x in lines if x.startswith("FAILED ")), "")
    name, _, reason = line.rpartition("::")[2].partition(" - ")
    return f"{name.partition('[')[0]}: {reason.partition(':')[0][:50]}"


def _run(copy: Path, tests: str) -> tuple[str, float]:
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(_pytest(copy, tests))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    verdict = {0: "passed", 1: "failed", -signal.SIGALRM: "too slow"}.get(code, f"error {code}")
    return verdict, time.monotonic() - started


def _pytest(copy: Path, tests: str) -> int:
    import pytest

    signal.alarm(SECONDS)
    sink = os.open(copy / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    import kdrl_lightning

    if not Path(kdrl_lightning.__file__).is_relative_to(copy.resolve()):
        return 99
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", f"tests/{tests}"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
