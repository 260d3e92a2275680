"""A reward's text has all special tokens except those that begin, end or pad a turn."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdrl_lightning.engines.base import Completion, Sampling
from kdrl_lightning.rewards import FormatReward, RewardRunner, Sample
from kdrl_lightning.rollout.generation import _texts, sample_and_judge

TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "<|im_start|>"]
FRAME = {"bos_token": "<s>", "eos_token": "<eos>", "pad_token": "<pad>"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and tags that are special tokens."""
    letters = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=letters, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in [*FRAME.values(), *TAGS]])
    core.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=core, **FRAME)


class Says:
    """An engine that says a text."""

    def __init__(self, ids: list[int], truncated: bool = False) -> None:
        self.completion = Completion(ids, [0.0] * len(ids), truncated)

    def generate(self, prompts: Any, seeds: Any, sampling: Sampling) -> list[list[Completion]]:
        return [[self.completion] * len(own) for own in seeds]


def heard(tokenizer: Any, text: str, truncated: bool = False) -> str:
    texts: list[str] = []

    def reward(sample: Sample) -> float:
        texts.append(sample.text)
        return 0.0

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    engine, rows = Says(ids, truncated), [({}, [1])]
    (judged,) = sample_and_judge(
        engine, tokenizer, RewardRunner(reward), rows, [[0]], Sampling(len(ids))
    )
    assert texts == [judged.text]
    return texts[0]


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("<think>so</think> <answer>42</answer><eos>", "<think>so</think> <answer>42</answer>"),
        ("<s>so<eos>", "so"),
        ("42 <|im_start|><tool_call> é<eos>", "42 <|im_start|><tool_call> é"),
        ("<eos>", ""),
        (" 42 \n<eos>", " 42 \n"),
    ],
)
def test_tags_stay_and_the_frame_goes(tokenizer: Any, said: str, text: str) -> None:
    assert heard(tokenizer, said) == text


def test_what_is_cut_loses_no_tag(tokenizer: Any) -> None:
    assert heard(tokenizer, "<think>so</think>", truncated=True) == "<think>so</think>"


def test_the_token_that_ended_a_completion_is_no_part_of_it(tokenizer: Any) -> None:
    # Another end token than the tokenizer's: engines stop at it, too.
    assert heard(tokenizer, "<think>so</think>42<|im_end|>") == "<think>so</think>42"
    ids = tokenizer("<think>42<|im_end|>")["input_ids"]
    ended, cut = (Completion(ids, [0.0] * len(ids), truncated) for truncated in (False, True))
    assert _texts(tokenizer, [ended, cut]) == ["<think>42", "<think>42<|im_end|>"]


def test_the_format_is_rewarded_where_tags_are_special_tokens(tokenizer: Any) -> None:
    ids = tokenizer("<think>so</think><answer>42</answer><eos>")["input_ids"]
    rewards = RewardRunner(FormatReward())
    (judged,) = sample_and_judge(
        Says(ids), tokenizer, rewards, [({}, [1])], [[0]], Sampling(len(ids))
    )
    assert judged.verdict.correct and judged.completion.ids == ids


def test_a_tokenizer_that_cleans_up_spaces_changes_no_text() -> None:
    words = {"<unk>": 0, "f": 1, "(": 2, "a": 3, ",": 4, "!": 5, "<eos>": 6}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", clean_up_tokenization_spaces=True
    )
    assert tokenizer.decode([1, 3, 4, 5]) == "f a,!"
    assert heard(tokenizer, "f a , ! <eos>") == "f a , !"
