"""Provides Knights and Knaves of reasoning-gym: puzzles, answers and scorer.

The puzzles are those of ``KnightsAndKnavesPrompts`` with two inhabitants, in fewer words, and split
into parts by the statements. Entries and statements of reasoning-gym are ``Any``: it has no types.
"""

from __future__ import annotations

import itertools
import re
import zlib
from typing import Any, Literal

from kdrl_lightning.errors import ConfigurationError, load_library, require_count
from kdrl_lightning.prompts import KnightsAndKnavesPrompts, PromptSource
from kdrl_lightning.prompts.reasoning_gym import SEED_STRIDE
from kdrl_lightning.rewards import Sample, Verdict
from kdrl_lightning.rewards.reasoning_gym import load_scorer

generator = load_library("reasoning_gym.logic.knights_knaves")

PUZZLE = re.compile(r"You meet \d+ inhabitants: (.*) So who is ")
CONNECTIVES = "is if then and or only it not the case that true false yes no ; ( )"


class KnightsAndKnaves(PromptSource):
    """Puzzles of two inhabitants; a row depends on index, seed, depth, width and part alone.

    ``prompt`` is reasoning-gym's puzzle text without the sentences that are the same in all puzzles
    with these words for the roles: the inhabitants and what they say. ``question`` is the whole.

    Names, roles and phrases make nearly every text unique, but there are only some hundred pairs of
    statements of depth 2. So one pair of statements in five is held out, chosen by its checksum:
    none of them occurs in the part ``train``, none of the others in ``validation``. A pair and its
    mirror image (the two inhabitants exchanged) are on the same side.

    Args:
        size: number of puzzles.
        seed: seed of the puzzles.
        depth: deepest nesting of a statement, from 2 on.
        width: most branches of a statement, from 2 on.
        part: which pairs of statements: ``train``, ``validation`` or ``all``.

    Attributes:
        dropped: number of puzzles of the other part that were left out.
    """

    def __init__(
        self,
        size: int = 4096,
        seed: int = 0,
        depth: int = 2,
        width: int = 2,
        part: Literal["train", "validation", "all"] = "train",
    ) -> None:
        require_count("size", size, 1, SEED_STRIDE // 100)
        if part not in ("train", "validation", "all"):
            raise ConfigurationError(f"`part` must be train, validation or all: got {part}.")
        puzzles = KnightsAndKnavesPrompts(2, SEED_STRIDE, seed, depth, width)
        self.dropped = 0
        self._rows: list[dict[str, Any]] = []
        entries = (puzzles[i] for i in itertools.count())
        while len(self._rows) < size:
            entry = next(entries)
            if part == "all" or held_out(entry) == (part == "validation"):
                self._rows.append(self._row(entry))
            else:
                self.dropped += 1

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]

    def _row(self, entry: dict[str, Any]) -> dict[str, Any]:
        found = PUZZLE.search(entry["question"])
        if found is None:
            raise ConfigurationError(
                f"a puzzle must have inhabitants and a question: got {entry['question']!r}. "
                "Install reasoning-gym 0.1.25."
            )
        return {"prompt": found[1], "answer": entry["answer"], "question": entry["question"]}


def held_out(entry: dict[str, Any]) -> bool:
    """Return whether the statements, as worded, belong to the validation part."""
    form = [reading(statement) for statement in entry["metadata"]["statements"]]
    same = min(repr(form), repr([mirrored(statement) for statement in reversed(form)]))
    return zlib.crc32(same.encode()) % 5 == 0


def mirrored(statement: Any) -> Any:
    """Return what the other inhabitant says in the mirror image.

    >>> mirrored(("and", ("telling-truth", 1), ("lying", 0)))
    ('and', ('telling-truth', 0), ('lying', 1))
    """
    if isinstance(statement, int):
        return 1 - statement
    if isinstance(statement, tuple):
        return tuple(mirrored(part) for part in statement)
    return statement


def reading(statement: Any) -> Any:
    """Return the statement as the generator words it: "not lying" reads "telling the truth".

    >>> reading(("and", ("not", ("lying", 1)), ("telling-truth", 0)))
    ('and', ('telling-truth', 1), ('telling-truth', 0))
    """
    if not isinstance(statement, tuple):
        return statement
    opposite = {"lying": "telling-truth", "telling-truth": "lying"}
    if statement[0] == "not" and statement[1][0] in opposite:
        return opposite[statement[1][0]], statement[1][1]
    return tuple(reading(part) for part in statement)


class KnightsTraces(KnightsAndKnaves):
    """Adds ``completion`` to the puzzles: a check of the four cases, then reasoning-gym's answer.

    The cases: both tell the truth, only the first, only the second, neither. For each: is the first
    statement true, is the second, and does that fit the case.
    """

    def _row(self, entry: dict[str, Any]) -> dict[str, Any]:
        checks = check_cases(entry["metadata"]["statements"])
        return {**super()._row(entry), "completion": f"{checks} ; {entry['answer']}"}


def check_cases(statements: Any) -> str:
    """Return the truth of each statement in each case, and whether the case is possible.

    >>> check_cases((("lying", 1), ("telling-truth", 1)))
    'false true no true false yes false true yes true false no'
    """
    holds = generator.KnightsKnavesDataset.test_satisfiability
    words = []
    for case in itertools.product((True, False), repeat=len(statements)):
        truth = [bool(holds(statement, case)) for statement in statements]
        words += ["true" if value else "false" for value in truth]
        words.append("yes" if truth == list(case) else "no")
    return " ".join(words)


class KnightsReward:
    """Scores with reasoning-gym's ``score_answer``; only the full score counts as correct.

    Args:
        partial: keep partial credit (0.65 for one right role of two); if false, it becomes 0.
    """

    def __init__(self, partial: bool = False) -> None:
        self.partial = partial
        self._score = load_scorer("knights_knaves")

    def __call__(self, sample: Sample) -> Verdict:
        """Judge one sample; text before the answer does not count."""
        answer = sample.text.rpartition(";")[2]
        score = float(self._score(answer, dict(sample.row)))
        correct = score >= 1.0
        return Verdict(score if self.partial else float(correct), correct)


def make_tokenizer() -> Any:
    """Return a tokenizer with a token per word and punctuation mark of the generator."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    templates = [t.format(name="", content="") for t in generator.TEMPLATES]
    roles = [role for pair in generator.KNIGHT_KNAVE_PAIRS for role in pair]
    text = " ".join([CONNECTIVES, *templates, *roles, *generator.COMMON_NAMES])
    words = sorted({word for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    # Words with spaces between, none before punctuation.
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
