"""SupervisedDataModule: given completions, split over several processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.small_tokenizers import make
from kdrl_lightning import ConfigurationError, SupervisedDataModule
from kdrl_lightning.datamodule.supervised import encode_completion
from kdrl_lightning.errors import TrainingStopped
from kdrl_lightning.models.end_tokens import EndTokens
from kdrl_lightning.models.loading import load_tokenizer
from kdrl_lightning.prompts.prompt_set import sample_rows
from kdrl_lightning.rollout.loader import rows_at
from kdrl_lightning.tiny.models import make_tokenizer

TRACES = [{"prompt": f"{i}+1=", "completion": "1" * (i + 1)} for i in range(8)]


def attach(data: SupervisedDataModule, tokenizer: Any, rank: int, size: int, longest: float) -> Any:
    def reduce(value: torch.Tensor, operation: str) -> torch.Tensor:
        return value * size if operation == "sum" else torch.tensor(longest)

    module = SimpleNamespace(
        tokenizer=tokenizer,
        end_tokens=EndTokens((tokenizer.eos_token_id,)),
        reduce=reduce,
        device=torch.device("cpu"),
        objective=None,
        teacher=None,
        vocabulary_rows=len(tokenizer),
        context_length=24,
    )
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=module,
        global_rank=rank,
        global_step=0,
        world_size=size,
        accumulate_grad_batches=2,
        limit_val_batches=1.0,
        limit_train_batches=1.0,
        overfit_batches=0,
    )
    return data


@pytest.mark.parametrize(("batch_size", "ranks"), [(7, 2), (2, 2), (1, 1)])
def test_a_batch_without_a_part_for_each_rank_is_refused(batch_size, ranks, student_folder):
    data = SupervisedDataModule(TRACES, batch_size)
    attach(data, load_tokenizer(student_folder), 0, ranks, 0.0)
    words = rf"`batch_size` must be a multiple of the {ranks} processes, with .*: got {batch_size}"
    with pytest.raises(ConfigurationError, match=words):
        data.setup("fit")


def test_ranks_agree_on_the_longest_completion(student_folder):
    tokenizer = load_tokenizer(student_folder)
    parts = []
    for rank in range(2):
        data = attach(SupervisedDataModule(TRACES, 8), tokenizer, rank, 2, 9.0)
        data.setup("fit")
        parts.append([data.on_after_batch_transfer(i, 0) for i in range(2)])
    rows = [part.completion_lengths.tolist() for rank in parts for part in rank]
    assert sorted(n for row in rows for n in row) == list(range(2, 10))
    assert {part.totals.max_tokens for rank in parts for part in rank} == {9}


def one_rank(traces: Any, folder: str, batch_size: int = 4, **trainer: Any) -> Any:
    data = attach(SupervisedDataModule(traces, batch_size), load_tokenizer(folder), 0, 1, 0.0)
    data.trainer.lightning_module.reduce = lambda value, operation: value
    for name, value in trainer.items():
        setattr(data.trainer, name, value)
    data.setup("fit")
    return data


def texts_of(data: Any, step: int) -> list[str]:
    data.trainer.global_step = step
    parts = [data.on_after_batch_transfer(i, 0) for i in range(2)]
    rows = [ids[ids > 0].tolist() for part in parts for ids in part.input_ids]  # 0 is padding
    tokenizer = data.trainer.lightning_module.tokenizer
    return sorted(tokenizer.decode(row).partition("<eos>")[0] for row in rows)


def test_a_completion_has_one_end_token(student_folder):
    tokenizer = load_tokenizer(student_folder)
    ends = EndTokens((tokenizer.eos_token_id,))
    for text in ("12", "12<eos>"):
        assert encode_completion(tokenizer, {"completion": text}, ends) == [3, 4, 1]
    assert encode_completion(tokenizer, {"completion": ""}, ends) == [1]


def test_white_space_after_an_end_token_is_no_part_of_a_completion() -> None:
    tokenizer = chat_tokenizer()
    ends = EndTokens((1, 16), 16)  # <eos> and ;
    row = {"prompt": [{"role": "user", "content": "1"}]}
    for text in ("12;", "12<eos>\n", "12;\n\n", "12;\n<eos> \n"):
        ids = encode_completion(tokenizer, {**row, "completion": text}, ends)
        assert ids == [3, 4, 16], text
    assert encode_completion(tokenizer, {**row, "completion": "1\n"}, ends) == [3, 17, 16]


@pytest.mark.parametrize("kind", ["prefixed", "sentencepiece", "metaspace", "unigram", "bpe"])
def test_a_completion_begins_with_no_space_of_the_tokenizer(kind: str) -> None:
    tokenizer = make(kind)
    ends = EndTokens((tokenizer.eos_token_id,))
    prompt = tokenizer("x = 1\n", add_special_tokens=False)["input_ids"]
    for text in ("357", "The answer", " is", "\n\nx", "  y"):
        ids = encode_completion(tokenizer, {"prompt": "x = 1\n", "completion": text}, ends)
        written = tokenizer.decode([*prompt, *ids[:-1]])
        assert written == tokenizer.decode(prompt) + text


@pytest.mark.parametrize(
    ("opening", "space"), [(" ", " "), ("", ""), ("{{ '\\n' }}", "\n"), ("<x>", "")]
)
def test_a_completion_begins_as_the_template_writes_it(opening: str, space: str) -> None:
    tokenizer = make("sentencepiece")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[I]{{ m.content }}[/I]{% else %}"
        + opening
        + "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    row = {"prompt": [{"role": "user", "content": "x"}], "completion": "The answer"}
    ids = encode_completion(tokenizer, row, EndTokens((tokenizer.eos_token_id,)))
    front = tokenizer("[/I]", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode([*front, *ids[:-1]]) == "[/I]" + space + "The answer"


def test_a_completion_with_letters_that_the_tokenizer_drops_is_refused(student_folder: str) -> None:
    tokenizer = load_tokenizer(student_folder)
    with pytest.raises(ConfigurationError, match="must know every character of a completion: got "):
        encode_completion(tokenizer, {"completion": "12 a"}, EndTokens((1,)))


def chat_tokenizer() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [";"]})
    tokenizer.add_tokens(["\n", " "])
    return tokenizer


BAD = {
    "none": ({"completion": None}, r"`completion` must be text: got None"),
    "a number": ({"completion": 5}, r"`completion` must be text: got 5"),
    "missing": ({"completion": float("nan")}, r"`completion` must be text: got nan"),
    "no column": ({}, r"`completion` must be text: got None"),
    "no prompt": ({"prompt": " ", "completion": "1"}, r"a prompt must have at least one token"),
    "too long": ({"completion": "1" * 30}, r"must have at most 24 tokens, .*: got 35"),
}


@pytest.mark.parametrize(("change", "words"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_is_named_before_the_run(change, words, student_folder):
    rows = [*TRACES, {"prompt": "1+1=", **change}]
    with pytest.raises(ConfigurationError, match=rf"^row 8 of `traces`: .*{words}"):
        one_rank(rows, student_folder)


@pytest.mark.parametrize("model", ["student", "teacher"])
@pytest.mark.parametrize("traces", [TRACES, [{"prompt": "1", "completion": "="}] * 4])
def test_a_token_without_a_row_in_the_embedding_is_named(traces, model, student_folder):
    data = attach(SupervisedDataModule(traces, 4), load_tokenizer(student_folder), 0, 1, 0.0)
    module = data.trainer.lightning_module
    if model == "student":
        module.vocabulary_rows = 13
    else:
        module.teacher = SimpleNamespace(vocabulary_rows=13)
    words = (
        rf"^row 0 of `traces`: .*one of the 13 rows of the {model}'s embedding: "
        r"got the token '=', id 13\."
    )
    with pytest.raises(ConfigurationError, match=words):
        data.setup("fit")


def test_a_bad_row_later_is_replaced_and_named(student_folder):
    rows = [{"prompt": f"{i}=", "completion": "1"} for i in range(3000)]
    whole = one_rank(rows, student_folder)
    checked = set(sample_rows(3000, 1000, 0))
    # A step whose last row was not looked at before the run.
    step = next(s for s in range(1, 99) if not checked & set(rows_at([s * 4 + 3], 3000, 0)))
    (bad,) = rows_at([step * 4 + 3], 3000, 0)
    expected = texts_of(whole, step)
    (instead,) = rows_at([(step + 1) * 4 + 3], 3000, 0)
    broken = one_rank(
        [*rows[:bad], {**rows[bad], "completion": None}, *rows[bad + 1 :]], student_folder
    )
    with pytest.warns(UserWarning, match=rf"^skipped row {bad} of `traces`: .*got None"):
        found = texts_of(broken, step)
    assert set(expected) - set(found) == {f"{bad}=1"}
    assert set(found) - set(expected) == {f"{instead}=1"}
    assert texts_of(broken, 0) == texts_of(whole, 0)


def test_too_many_bad_rows_stop_the_run(student_folder):
    checked = set(sample_rows(3000, 1000, 0))
    rows = [{"prompt": f"{i}=", "completion": "1" if i in checked else None} for i in range(3000)]
    data = one_rank(rows, student_folder)
    with (
        pytest.warns(UserWarning, match="skipped row"),
        pytest.raises(TrainingStopped, match=r"drawn in the last 1 rollouts cannot be used, above"),
    ):
        texts_of(data, 0)


def test_overfit_batches_takes_the_same_rows_again(student_folder):
    data = one_rank(TRACES * 3, student_folder, overfit_batches=4)
    steps = [texts_of(data, step) for step in range(6)]
    assert steps[0] != steps[1]
    assert steps == [steps[0], steps[1]] * 3
    words = r"`overfit_batches` must be whole optimizer steps of 2 micro-batches: got 3, which is 3"
    with pytest.raises(ConfigurationError, match=words):
        one_rank(TRACES * 3, student_folder, overfit_batches=3)
