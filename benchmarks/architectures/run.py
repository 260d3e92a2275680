"""Writes the table of architectures: ``docs/architectures.md`` and its JSON.

Run it as ``python -m benchmarks.architectures.run``; ``--families qwen3,gemma2`` and
``--columns sampling,vLLM`` update a part of it. Each family runs in a separate process, with a time
limit. Without vLLM, its column stays as it is.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers

from benchmarks.architectures import cases, families, vllm_case

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architectures.md"
TABLE = ROOT / "docs" / "architectures" / "architectures.json"
SECONDS = 240
VLLM = "vLLM"


def work(model_type: str, columns: list[str], send: object) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        try:
            cells = cases.row(model_type, Path(folder), columns)
        except Exception as error:
            cells = {"loads": f"failed: {type(error).__name__}: {error}".splitlines()[0]}
    send.send(cells)  # type: ignore[attr-defined]


def try_family(model_type: str, columns: list[str]) -> dict[str, str]:
    fork = multiprocessing.get_context("fork")  # each starts with the libraries loaded
    receive, send = fork.Pipe(duplex=False)
    process = fork.Process(target=work, args=(model_type, columns, send))
    process.start()
    send.close()
    try:
        if receive.poll(SECONDS):
            return dict(receive.recv())
        return {"loads": f"failed: no answer in {SECONDS} s"}
    except EOFError:
        return {"loads": f"failed: the process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def with_vllm(table: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Add the results of ``vllm_case``."""
    found = vllm_case.results()
    return {
        name: {**cells, VLLM: _unloaded(cells) or found.get(name, cases.NOT)}
        for name, cells in table.items()
    }


def _unloaded(cells: dict[str, str]) -> str:
    """Return why a model is refused at loading, so that no engine is tried; "" if it loads."""
    loads = cells.get("loads", cases.NOT)
    return loads if loads.startswith("refused") else ""


def markdown(table: dict[str, dict[str, str]]) -> str:
    table = with_vllm(table)
    columns = [*cases.COLUMNS, VLLM]
    notes: dict[str, int] = {}

    def short(cell: str) -> str:
        kind, _, reason = cell.partition(": ")
        return cell if not reason else f"{kind} [{notes.setdefault(reason, len(notes) + 1)}]"

    lines = [f"| model type | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for name, cells in sorted(table.items()):
        lines.append(f"| {name} | {' | '.join(short(cells.get(c, '—')) for c in columns)} |")
    out = [HEAD.format(count=len(table), version=transformers.__version__), *lines, ""]
    out += [f"{number}. {reason}" for reason, number in notes.items()]
    out += ["", "Types for which no small model is built:", ""]
    out += [f"- {name}: {reason}" for name, reason in sorted(families.LEFT_OUT.items())]
    return "\n".join(out) + "\n"


HEAD = """# Architectures

This page shows what works for each of the {count} types of causal language models that
transformers {version} can build, tried as a random model of about 0.2 million parameters. Each
cell compares with the model's logits of one row at a time, without padding and without a cache.

- loads: the scorer accepts the model. If it refuses one, it does so before training, in one line.
- log-probs: the log-probabilities of completions of different lengths in one batch.
- shared prompts: a prompt of several completions is run once; — means that each row is run whole.
- sampling: `TransformersEngine` samples, and its log-probabilities are those of whole rows.
  "without a cache" means that each token takes a pass over all tokens before it.
- LoRA: a step changes the log-probabilities, and the merged weights give the same ones.
- fsdp2: the log-probabilities of a sharded model, and a backward pass.
- export and resume: the folder that `export` writes, and a model rebuilt from a checkpoint.
- vLLM: its engine against the scorer, on a CPU, before and after all weights change. "refused"
  means that a run stops before its first rollout, with the line below.

Sliding windows, chunks and sparse attention are 8 tokens wide here, and the compared rows are
longer. At the start of a run with a real model, a row longer than these widths is compared too, if
they are at most 4096 tokens and, on a CPU, the row costs less than about a second.

Some rotary embeddings change with length (longrope of Phi-3 and Phi-4, dynamic NTK); the scorer
chooses a row's embedding by the row's length. `TransformersEngine` cannot sample completions that
grow past the change, because the change would affect all earlier tokens. A run checks its prompts
before it loads weights: `overlong_prompts` decides whether prompts that may cross the change stop
the run or are left out. vLLM uses longrope's long embedding for all rows if `max_model_len` is
above the change; its log-probabilities of shorter rows then differ from the scorer's, and a warning
says so.

vLLM's code for some types imports torchvision or numba, which were not installed for these cells.
With torchvision 0.28, `gemma3` gives "yes", and `qwen3_5_text` "yes, in bfloat16", 0.06 apart on
average.

`python -m benchmarks.architectures.run` makes this table; `tests/models/architectures` and
`tests/engines/vllm` test a part of it.
"""


def update(
    table: dict[str, dict[str, str]], name: str, columns: list[str]
) -> dict[str, dict[str, str]]:
    """Return the table with the chosen cells of one type updated; write the results of vLLM."""
    own = [c for c in columns if c in cases.COLUMNS]
    found = try_family(name, own) if own else {}
    table = {**table, name: {**table.get(name, {}), **found}}
    if VLLM in columns and not _unloaded(table[name]):
        found = {**found, VLLM: vllm_case.try_family(name)}
        vllm_case.record(name, found[VLLM])
    print(name, found, flush=True)
    return table


def main() -> None:
    known = [*cases.COLUMNS, *([VLLM] if find_spec("vllm") else [])]
    parser = argparse.ArgumentParser()
    parser.add_argument("--families", default=",".join(families.families()))
    parser.add_argument("--columns", default=",".join(known))
    chosen = parser.parse_args()
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for name in chosen.families.split(","):
        table = update(table, name, chosen.columns.split(","))
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        PAGE.write_text(markdown(table))


if __name__ == "__main__":
    main()
