"""Our alignment against that of TRL's GOLD trainer, on texts that both can encode."""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.small_tokenizers import TEXT, make
from kdrl_lightning.teachers.cross_tokenizer import Aligner, TokenBytes

pytest.importorskip("trl", reason="needs the extra `peers`")

END = 1
KINDS = ["bytes", "bpe", "digits"]  # TRL refuses tokenizers that are not byte-level
tokenizer = cache(make)


@cache
def aligner(student: str, teacher: str) -> Aligner:
    pair = [TokenBytes(tokenizer(kind), kind, [END]) for kind in (student, teacher)]
    return Aligner(*pair, [END])


@cache
def trl() -> tuple[Any, Any]:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # a fixture restores the environment
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other versions of vLLM, of which nothing is used here
        gold = import_module("trl.experimental.gold.gold_trainer")
    return gold.encode_with_byte_offsets, gold.ULDLoss._align_by_byte_offsets


def ours(student: str, teacher: str, ids: list[int]) -> list[tuple[int, int]]:
    (one,) = aligner(student, teacher)([np.array([*ids, END])], [END])
    starts = np.flatnonzero(one.places == 0)
    theirs = np.flatnonzero(one.teacher_places == 0)
    sizes = np.diff([*starts, len(one.places)]), np.diff([*theirs, len(one.teacher_ids)])
    return list(zip(*(s.tolist() for s in sizes), strict=True))[:-1]  # without the end token


@pytest.mark.parametrize(
    ("student", "teacher"), [("bytes", "bpe"), ("bpe", "digits"), ("digits", "bpe")]
)
@settings(max_examples=40, deadline=None)
@given(text=st.text(st.sampled_from(TEXT), min_size=1, max_size=40))
def test_chunks_are_those_of_gold(student: str, teacher: str, text: str) -> None:
    """The student's tokens are those of its own tokenizer: TRL decodes and encodes again."""
    encode, align = trl()
    ((ids, mine),) = encode(tokenizer(student).backend_tokenizer, [text])
    ((_, theirs),) = encode(tokenizer(teacher).backend_tokenizer, [text])
    groups = align(mine, theirs)
    expected = [(len(a), len(b)) for a, b in zip(*groups, strict=True)]
    assert ours(student, teacher, ids) == expected
