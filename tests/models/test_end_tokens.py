"""Every end token of tokenizer, configuration and generation configuration ends a completion."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.short_runs import fit, make_data, make_module
from kdrl_lightning import GKD, GRPO, SFT, KDRLModule, LocalTeacher, SupervisedDataModule
from kdrl_lightning.engines.base import Completion
from kdrl_lightning.engines.vllm.requests import completion
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.end_tokens import EndTokens, end_tokens, turn_end, warn_of_turn_end
from kdrl_lightning.models.loading import load_causal_lm, load_tokenizer
from kdrl_lightning.rollout.generation import _ended
from kdrl_lightning.rollout_batch import STUDENT, TEACHER

# A random model stops late and is rarely right.
pytestmark = pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")

EOS, NINE, TURN = 1, 11, 16
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [{"role": "user", "content": "1+1="}]


def edit(folder: Path, name: str, **values: Any) -> None:
    """Change keys of a JSON file; None deletes one."""
    file = folder / name
    old = json.loads(file.read_text()) if file.exists() else {}
    new = {k: v for k, v in {**old, **values}.items() if v is not None}
    file.write_text(json.dumps(new))


def copied(folder: str, to: Path, **files: dict[str, Any]) -> str:
    shutil.copytree(folder, to)
    for name, values in files.items():
        edit(to, f"{name}.json", **values)
    return str(to)


@pytest.fixture(scope="module")
def chat_student(student_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A student whose template ends turns with ``<|im_end|>``; its tokenizer's end is ``<eos>``."""
    folder = tmp_path_factory.mktemp("chat") / "student"
    tokenizer, model = load_tokenizer(student_folder), load_causal_lm(student_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.chat_template = CHATML
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == TURN
    edit(folder, "generation_config.json", eos_token_id=[EOS, TURN])
    return str(folder)


def found(folder: str) -> EndTokens:
    return end_tokens(folder, load_tokenizer(folder))


def test_one_end_token_is_that_of_all_files(student_folder: str) -> None:
    assert found(student_folder) == EndTokens((EOS,), None)


def test_the_generation_configuration_adds_its_own(chat_student: str) -> None:
    assert found(chat_student) == EndTokens((EOS, TURN), TURN)


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        ({"generation_config": {"eos_token_id": NINE}}, (EOS, NINE)),
        ({"generation_config": {"eos_token_id": [NINE, 4]}}, (EOS, NINE, 4)),
        ({"generation_config": {"eos_token_id": None}}, (EOS,)),
        ({"config": {"eos_token_id": [EOS, NINE]}}, (EOS, NINE)),
        ({"config": {"eos_token_id": NINE}}, (EOS, NINE)),
        ({"config": {"eos_token_id": None}, "generation_config": {"eos_token_id": 4}}, (EOS, 4)),
        ({"tokenizer_config": {"eos_token": "9"}}, (NINE, EOS)),
        ({"generation_config": {"eos_token_id": [EOS, 99]}}, (EOS,)),  # no such row
    ],
)
def test_all_files_count(
    files: dict[str, Any], ids: tuple[int, ...], student_folder: str, tmp_path: Path
) -> None:
    assert found(copied(student_folder, tmp_path / "it", **files)).ids == ids


def test_a_folder_without_a_generation_configuration(student_folder: str, tmp_path: Path) -> None:
    folder = copied(student_folder, tmp_path / "it", config={"eos_token_id": [EOS, 5]})
    (Path(folder) / "generation_config.json").unlink()
    assert found(folder).ids == (EOS, 5)


def test_a_class_default_is_no_end_token_where_the_tokenizer_has_text(
    student_folder: str, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    assert config.eos_token_id == 2  # nobody said so
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    load_tokenizer(student_folder).save_pretrained(tmp_path)
    assert found(str(tmp_path)).ids == (EOS,)
    edit(tmp_path, "config.json", eos_token_id=3)
    assert found(str(tmp_path)).ids == (EOS, 3)
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.add_special_tokens({"bos_token": tokenizer.convert_ids_to_tokens(2)})
    tokenizer.save_pretrained(tmp_path)  # now the default names a special token
    edit(tmp_path, "config.json", eos_token_id=2)
    assert found(str(tmp_path)).ids == (EOS, 2)


def test_a_configuration_inside_another_counts(student_folder: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Gemma3Config

    text = {"vocab_size": 16, "hidden_size": 8, "eos_token_id": 4}
    Gemma3Config(text_config=text, eos_token_id=[5, 6]).save_pretrained(tmp_path)
    load_tokenizer(student_folder).save_pretrained(tmp_path)
    assert set(end_tokens(str(tmp_path), AutoTokenizer.from_pretrained(student_folder)).ids) == {
        EOS, 4, 5, 6,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("template", "turn"),
    [
        (None, None),
        (CHATML, TURN),
        ("{% for m in messages %}{{ m.content | trim }} <|im_end|>{% endfor %}", TURN),
        ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", EOS),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        (
            "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}"
            "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
            TURN,
        ),
        ("the same for all", None),
        (CHATML.replace("m.content", "m.content[0].text"), TURN),
        (CHATML.replace("m['content']", "m['content'][0]['text']"), TURN),
        (
            "{% for m in messages %}{% for p in m.content if p.type == 'text' %}{{ p.text }}"
            "{% endfor %}{{ eos_token }}{% endfor %}",
            EOS,
        ),
    ],
)
def test_the_end_of_a_turn(template: str | None, turn: int | None, chat_student: str) -> None:
    tokenizer = load_tokenizer(chat_student)
    tokenizer.chat_template = template
    assert turn_end(tokenizer) == turn


def test_a_turn_that_nothing_ends_is_a_warning_with_the_token(
    chat_student: str, tmp_path: Path
) -> None:
    folder = copied(chat_student, tmp_path / "it", generation_config={"eos_token_id": EOS})
    ends = found(folder)
    assert ends == EndTokens((EOS,), None)
    with pytest.warns(UserWarning, match=r"closes a turn with '<\|im_end\|>' \(16\).*\['<eos>'\]"):
        warn_of_turn_end(ends, load_tokenizer(folder), folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'][0]['text'] }}<|im_end|>{% endfor %}"
    )
    with pytest.warns(UserWarning, match=r"closes a turn with '<\|im_end\|>' \(16\).*\['<eos>'\]"):
        warn_of_turn_end(ends, tokenizer, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_turn_end(found(chat_student), load_tokenizer(chat_student), chat_student)


@pytest.mark.parametrize(
    ("after", "words"),
    [
        (
            "<|end|>",
            r"with the text '<\|end\|>', which holds no end token: .*'<eos>'",
        ),
        ("\n### {{ eos_token }}", None),
        ("\n", None),
    ],
)
def test_a_turn_that_a_text_closes_is_a_warning(
    after: str, words: str | None, chat_student: str
) -> None:
    tokenizer = load_tokenizer(chat_student)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}" + after + "{% endfor %}"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warn_of_turn_end(EndTokens((EOS,)), tokenizer, "it")
    assert len(seen) == (words is not None)
    if words:
        assert re.search(words, str(seen[0].message))


def test_a_template_that_is_no_text_is_refused(chat_student: str, tmp_path: Path) -> None:
    folder = copied(chat_student, tmp_path / "it")
    (Path(folder) / "chat_template.jinja").unlink(missing_ok=True)
    edit(Path(folder), "tokenizer_config.json", chat_template=5)
    words = r"^the `chat_template` of the tokenizer of .* must be a text: got 5\. Correct its tok"
    with pytest.raises(ConfigurationError, match=words):
        load_tokenizer(folder)


def first(trace: Any, source: int = STUDENT) -> list[list[int]]:
    """The completions of the first update, without padding."""
    batch = trace.seen[0][1]
    keep = (batch.source == source).nonzero().squeeze(-1)
    batch = batch.select(keep)
    return [
        row[:n].tolist()
        for row, n in zip(batch.completion_ids, batch.completion_mask.sum(1), strict=True)
    ]


def until(ids: list[int], *ends: int) -> list[int]:
    return next((ids[:i] for i, token in enumerate(ids, 1) if token in ends), ids)


def test_a_run_ends_completions_at_each_of_them(student_folder: str, tmp_path: Path) -> None:
    several = copied(
        student_folder, tmp_path / "it", generation_config={"eos_token_id": [EOS, NINE, 5]}
    )
    rows = []
    for folder in (student_folder, several):
        data = make_data(val_prompts=None, minibatches_per_rollout=1)
        trace = fit(tmp_path, make_module(folder, None, GRPO()), data, max_steps=1)
        rows.append((first(trace), trace.seen[0][1]))
    (plain, _), (cut, batch) = rows
    expected = [until(ids, NINE, 5) for ids in plain]
    assert sorted(cut) == sorted(expected) and cut != plain
    # In the order of the batch: what is cut at the limit has no end.
    assert batch.truncated.tolist() == [ids[-1] not in (EOS, NINE, 5) for ids in cut]


def test_a_teacher_ends_at_its_own_and_closes_with_the_students(
    chat_student: str, teacher_folder: str, tmp_path: Path
) -> None:
    teacher = copied(
        teacher_folder, tmp_path / "it", generation_config={"eos_token_id": [EOS, NINE, 5]}
    )
    data = make_data(val_prompts=None, teacher_completions=4, minibatches_per_rollout=1)
    own = LocalTeacher(teacher)
    own.check(load_tokenizer(teacher_folder), teacher_folder)
    own.load(torch.device("cpu"))
    weights = own.weights()
    assert weights is not None and weights.end_token_ids == (EOS, NINE, 5)
    trace = fit(tmp_path, make_module(teacher_folder, own, GKD()), data, max_steps=1)
    theirs = first(trace, TEACHER)
    assert all(NINE not in ids and 5 not in ids for ids in theirs)  # written as the student's
    ends = [ids[-1] == EOS for ids in theirs]
    batch = trace.seen[0][1].select((trace.seen[0][1].source == TEACHER).nonzero().squeeze(-1))
    assert any(ends) and batch.truncated.tolist() == [not end for end in ends]


def test_what_stops_a_completion_stays_if_it_is_the_students() -> None:
    ends = EndTokens((EOS, TURN), TURN)

    def after(ids: list[int], truncated: bool = False, **row: Any) -> tuple[list[int], bool]:
        made = _ended(Completion(ids, [0.0] * len(ids), truncated), ends, row)
        assert len(made.logprobs) == len(made.ids)
        return made.ids, made.truncated

    assert after([4, TURN], prompt="1+1") == ([4, TURN], False)
    assert after([4, EOS], prompt=CHAT) == ([4, EOS], False)
    assert after([4, TURN, 5, EOS], prompt="1+1") == ([4, TURN], False)
    assert after([4, TURN, 5, 6], True, prompt="1+1") == ([4, TURN], False)
    assert after([4, 5], True, prompt="1+1") == ([4, 5], True)
    assert after([4, 9], prompt="1+1") == ([4, EOS], False)
    assert after([4, 9], prompt=CHAT) == ([4, TURN], False)


def test_an_answer_of_vllm_may_end_with_any_of_them() -> None:
    assert not completion([4, TURN], [0.0, 0.0], (EOS, TURN)).truncated
    assert completion([4, 5], [0.0, 0.0], (EOS, TURN)).truncated


def test_given_completions_close_as_the_template_does(chat_student: str, tmp_path: Path) -> None:
    rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": CHAT, "completion": "23"}]
    module = KDRLModule(student=chat_student, objective=SFT())
    data = SupervisedDataModule(rows, batch_size=2)
    trace = fit(tmp_path, module, data, max_steps=1)  # type: ignore[arg-type]
    assert sorted(first_supervised(trace)) == [[4, EOS], [4, 5, TURN]]


def first_supervised(trace: Any) -> list[list[int]]:
    batch = trace.seen[0][1]
    return [
        row[:n].tolist()
        for row, n in zip(batch.completion_ids, batch.completion_mask.sum(1), strict=True)
    ]


def test_teacher_and_student_of_one_template_end_alike(chat_student: str, tmp_path: Path) -> None:
    renamed = copied(chat_student, tmp_path / "it")
    tokenizer = load_tokenizer(chat_student)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(renamed)
    assert found(renamed).ids == (TURN, EOS) and found(renamed).main == TURN
    teacher = LocalTeacher(renamed)
    teacher.check(load_tokenizer(chat_student), chat_student)
    assert teacher.other_end is None


@pytest.mark.parametrize(
    "values",
    [{"max_new_tokens": -1}, {"num_return_sequences": 4}, {"cache_implementation": "none"}],
    ids=str,
)
def test_a_value_that_transformers_refuses_hides_no_end_token(
    student_folder: str, tmp_path: Path, values: dict[str, Any]
) -> None:
    wanted = {"eos_token_id": [EOS, NINE], "do_sample": False, **values}
    assert found(copied(student_folder, tmp_path / "it", generation_config=wanted)).ids == (
        EOS,
        NINE,
    )


@pytest.mark.parametrize("value", ["5", 5.0, [[1, 5]], [1, None], True], ids=repr)
def test_an_end_token_that_is_no_id_is_refused(
    student_folder: str, tmp_path: Path, value: Any
) -> None:
    folder = copied(student_folder, tmp_path / "it")
    edit(Path(folder), "generation_config.json", eos_token_id=value)
    with pytest.raises(
        ConfigurationError, match=r"^`eos_token_id` must be a token id or a list of ids: got"
    ):
        found(folder)


def test_a_generation_configuration_that_is_no_json_is_refused(
    student_folder: str, tmp_path: Path
) -> None:
    folder = copied(student_folder, tmp_path / "it")
    for text in ('{"eos_token_id": [1, 5],}', "[1]", ""):
        (Path(folder) / "generation_config.json").write_text(text)
        with pytest.raises(ConfigurationError, match=r"generation_config\.json must be a JSON obj"):
            found(folder)


def test_a_configuration_of_other_types_is_refused(student_folder: str, tmp_path: Path) -> None:
    folder = copied(student_folder, tmp_path / "it", config={"eos_token_id": ["5"]})
    words = r"^the model's config\.json must be valid for transformers: got .*'eos_token_id'"
    with pytest.raises(ConfigurationError, match=words) as caught:
        found(folder)
    assert "\n" not in str(caught.value)
