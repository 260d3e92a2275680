"""The table of architectures in the docs agrees with the code, for a sample of families.

``python -m benchmarks.architectures.run`` makes all of it again.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest

from benchmarks.architectures import cases, families, run, vllm_case

TABLE = json.loads(run.TABLE.read_text())
# One of each kind: dense, soft-capped, windows, experts, hybrids, recurrent, none of these.
QUICK = [
    *("qwen3", "gemma2", "gemma3_text", "phi3", "gpt_oss", "glm4_moe", "qwen3_moe"),
    *("qwen3_next", "lfm2", "granitemoehybrid", "mamba", "bert"),
]
COLUMNS = ["loads", "log-probs", "shared prompts", "sampling"]


@pytest.mark.parametrize("name", QUICK)
def test_a_row_of_the_table_is_what_the_code_does(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = cases.row(name, tmp_path, COLUMNS)
    assert found == {column: TABLE[name][column] for column in COLUMNS}


# What other columns had to learn: routers and grouped layers, layers that a model reads itself,
# experts, and configurations with infinities or with parts that refuse a setting.
OTHERS = {
    "LoRA": ["deepseek_v4", "llama4_text", "mamba", "qwen3_next"],
    "export and resume": ["dbrx", "mamba2", "gemma3"],
}


@pytest.mark.parametrize(
    ("column", "name"), [(column, name) for column, names in OTHERS.items() for name in names]
)
def test_another_cell_of_the_table_is_what_the_code_does(
    column: str, name: str, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = cases.row(name, tmp_path, [column])
    assert found == {"loads": "yes", column: "yes"} == {c: TABLE[name][c] for c in found}


def test_the_table_has_every_type_and_no_wrong_numbers() -> None:
    assert sorted(TABLE) == families.families()
    cells = [(name, c, cell) for name, row in TABLE.items() for c, cell in row.items()]
    kinds = ("yes", "yes, without a cache", "—")
    assert [x for x in cells if x[2] not in kinds and not x[2].startswith("refused: ")] == []


# What a run says before its first rollout, with a reason and a cure.
REFUSALS = re.compile(
    r"refused: ("
    r"`rollout_engine` must be an engine that can run {name}: got VLLMEngine, which could not "
    r"(start|take the weights|sample): .{{10,}}\. (Install \w+ in|Check vLLM's) .*, or use "
    r"TransformersEngine\.|"
    r"`rollout_engine` must give the student's log-probabilities within .*: got VLLMEngine, which "
    r"is \S+ away for \w+ with .*\. Use TransformersEngine, or raise .*)"
)


def test_every_model_that_loads_has_a_cell_for_vllm() -> None:
    cells = vllm_case.results()
    assert sorted(cells) == [n for n in sorted(TABLE) if TABLE[n]["loads"] == "yes"]
    right = re.compile(r"yes(, within 0\.\d+: .*|, in bfloat16, .*: 0\.0\d+ apart on average)?")
    for name, cell in cells.items():
        refusal = re.compile(REFUSALS.pattern.format(name=name))
        assert right.fullmatch(cell) or refusal.fullmatch(cell), f"{name}: {cell}"


def test_the_page_shows_the_table() -> None:
    assert run.PAGE.read_text() == run.markdown(TABLE)


def test_a_difference_is_no_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(_: Path) -> str:
        raise cases.WrongError("scores: 0.3 apart")

    monkeypatch.setitem(cases.COLUMNS, "loads", wrong)
    assert cases.cell("loads", tmp_path) == "failed: WrongError: scores: 0.3 apart"
