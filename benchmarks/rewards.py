"""Measures rewards per second of each kind, and the cost of completions that hang.

``python benchmarks/rewards.py`` prints the table of ``docs/tasks.md``.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Sequence

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.prompts import KnightsAndKnavesPrompts, ReasoningGymPrompts
from kdrl_lightning.rewards import (
    CodeReward,
    ExactMatch,
    FormatReward,
    KnightsAndKnavesReward,
    LengthPenalty,
    MathReward,
    ReasoningGymReward,
    Reward,
    RewardFunction,
    RewardRunner,
    Sample,
    TaskReward,
    Verdict,
    WeightedRewards,
)
from kdrl_lightning.rewards.base import judge
from kdrl_lightning.tiny import addition_reward

HANGS = r"\boxed{9^{9^{9^{9}}}}"


def length(sample: Sample) -> float:
    """Return a reward, as a user's function does."""
    return float(len(sample.text))


def thought(answer: str) -> str:
    return f"<think>{'so it is ' * 100}</think>\n<answer>{answer}</answer>"


def cases(count: int, workers: int) -> list[tuple[str, Reward, list[Sample]]]:
    """Return a name, a reward, and completions that are right and wrong in turn."""
    plain = [Sample(thought(str(i)), [0] * 200, {"answer": str(i - i % 2)}) for i in range(count)]
    tasks, puzzles = ReasoningGymPrompts("chain_sum", count), KnightsAndKnavesPrompts(3, 100)

    def boxed(one: str, other: str) -> list[Sample]:
        texts = ["so " * 300 + rf"\boxed{{{one.replace('N', str(i))}}}" for i in range(count)]
        return [Sample(t, [], {"answer": other.replace("N", str(i))}) for i, t in enumerate(texts)]

    sums = [Sample(f"{i} #{i}", [], {"answer": str(i - i % 2)}) for i in range(count)]
    rows = [tasks[i] for i in range(count)]
    people = [puzzles[i] for i in range(len(puzzles))]
    program = "```python\ndef add(a, b):\n    return a + b\n```"
    both = {"format": FormatReward(), "answer": ExactMatch(marker="<answer>"), "n": length}
    few = max(count // 20, 20)
    return [
        ("`ExactMatch`", ExactMatch(marker="<answer>"), plain),
        ("`FormatReward`", FormatReward(), plain),
        ("`LengthPenalty`", LengthPenalty(256, 64), plain),
        ("`WeightedRewards` of three", WeightedRewards(both), plain),
        (
            "`KnightsAndKnavesReward`, 3 people",
            KnightsAndKnavesReward(),
            [Sample(thought(r["answer"]), [], r) for r in people * (count // len(people))],
        ),
        ("`MathReward`, integers", MathReward(workers=workers), boxed("N", "N")),
        ("`MathReward`, fractions", MathReward(workers=workers), boxed(r"\frac{N}{7}", "N/7")),
        (
            "`MathReward`, expressions",
            MathReward(workers=workers),
            boxed(r"\sqrt{N}(x+1)^2", r"\sqrt{N}(x^2+2x+1)")[:few],
        ),
        (
            "`ReasoningGymReward`, chain_sum",
            ReasoningGymReward(workers=workers),
            [Sample(thought(r["answer"]), [], r) for r in rows],
        ),
        ("`RewardFunction`, in this process", RewardFunction(length, time_limit_s=None), plain),
        ("`RewardFunction`", RewardFunction(addition_reward, workers=workers), sums),
        (
            "`CodeReward`, one run",
            CodeReward(workers=workers),
            [Sample(program, [], {"tests": f"assert add({i}, 1) == {i + 1}"}) for i in range(few)],
        ),
    ]


def speed(reward: Reward, samples: Sequence[Sample]) -> float:
    """Return completions per second, without the first one, which starts processes."""
    results: list[Verdict | Exception] = judge(reward, samples[:1])
    started = time.perf_counter()
    results += judge(reward, samples)
    seconds = time.perf_counter() - started
    if failed := [result for result in results if isinstance(result, Exception)]:
        raise failed[0]
    if isinstance(reward, TaskReward):
        reward.close()
    return len(samples) / seconds


def hanging(count: int, workers: int, limit: float) -> str:
    """Judge completions, of which one in a hundred hangs; return a line of the report."""
    reward = MathReward(time_limit_s=limit, workers=workers)
    runner = RewardRunner(reward)
    runner.start()
    # A hundred different completions, because equal pairs are judged once.
    texts = [
        rf"{HANGS[:-1]}+{i}}}" if i % 100 == 50 else rf"\boxed{{\frac{{{i}}}{{7}}}}"
        for i in range(count)
    ]
    samples = [Sample(text, [], {"answer": f"{i}/7"}) for i, text in enumerate(texts)]
    honest = [sample for i, sample in enumerate(samples) if i % 100 != 50]
    started = time.perf_counter()
    right = sum(verdict.correct for verdict in runner(honest))
    alone = time.perf_counter() - started
    # All workers stay busy, so the completions that do not hang cost what they cost alone. If each
    # call goes to a free worker, all are done within a worker's mean load plus one call.
    hung = count - len(honest)
    each = 1000 * alone * workers / len(honest)
    # Two calls that hang for each worker, and then one that does not, in a new process.
    some = samples[50::100][: 2 * workers] + honest[:workers]
    started = time.perf_counter()
    runner(some, training=False)
    one = (time.perf_counter() - started) / 2
    bound = alone + (hung / workers + 1) * one
    print(
        f"\n{count} completions, {hung} of which hang, {workers} workers, limit {limit:g} s\n"
        f"the others alone: {alone:.1f} s, {each:.1f} ms of a worker each\n"
        f"one that hangs: {one:.2f} s of a worker, with another process in its place\n"
        f"bound: {alone:.1f} + ({hung} / {workers} + 1) * {one:.2f} = {bound:.1f} s",
        flush=True,
    )
    started = time.perf_counter()
    verdicts = runner(samples)
    seconds = time.perf_counter() - started
    assert right == sum(verdict.correct for verdict in verdicts) == len(honest)
    reward.close()
    kept = "kept" if seconds <= bound else "not kept"
    return f"measured: {seconds:.1f} s, bound {kept}; all others are right"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=4000, help="completions per kind")
    parser.add_argument("--hanging", type=int, default=10_000, help="completions, 1 %% hanging")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=float, default=2.0, help="seconds of a verification")
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {args.workers} workers\n")
    print("| reward | completions per second |\n| --- | --- |")
    for name, reward, samples in cases(args.count, args.workers):
        try:
            print(f"| {name} | {speed(reward, samples):,.0f} |", flush=True)
        except ConfigurationError as error:
            print(f"| {name} | not measured: {error} |", flush=True)
    print(hanging(args.hanging, args.workers, args.limit))


if __name__ == "__main__":
    main()
