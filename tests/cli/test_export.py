"""`export`: a checkpoint's student as a Hugging Face folder, without a trainer."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from helpers.sharded_trainer import as_shards
from helpers.short_runs import trained
from kdrl_lightning.__main__ import main
from kdrl_lightning.cli.export import export
from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.tiny.models import make_tokenizer
from kdrl_lightning.trainer.failures import export_together

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*of the (completions|groups):UserWarning",
    "ignore:The number of training batches:UserWarning",
    "ignore:torch.distributed is .*:UserWarning",
)
KINDS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"bos_token_id": None}),
}


def save_model(folder: Path, kind: str, tied: bool) -> str:
    config_class, model_class, more = KINDS[kind]
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = config_class(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=96,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )
    model = model_class(config)
    model.generation_config.max_new_tokens = 17
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def same_files(ours: Path, theirs: Path) -> None:
    names = {p.name for p in ours.iterdir()}
    assert names == {p.name for p in theirs.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        out = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(2, 20)[None]).logits
    assert isinstance(out, torch.Tensor)
    return out


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_the_runs_own_export(tmp_path: Path, kind: str, tied: bool) -> None:
    start = save_model(tmp_path / "start", kind, tied)
    module, path = trained(tmp_path, start)
    export(path, str(tmp_path / "out"))
    same_files(tmp_path / "out", tmp_path / "student")
    with torch.no_grad():
        wanted = module.student.model(torch.arange(2, 20)[None]).logits
    assert torch.equal(logits(tmp_path / "out"), wanted)
    assert not torch.equal(logits(Path(start)), wanted)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("1+2=").input_ids == make_tokenizer()("1+2=").input_ids
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["max_new_tokens"] == 17
    # A folder of shards that holds the same gives the same.
    shards = as_shards(path, tmp_path / "step=00000002.ckpt")
    export(shards, str(tmp_path / "from_shards"))
    same_files(tmp_path / "from_shards", tmp_path / "student")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("run")
    return trained(root, save_model(root / "start", "qwen2", True))[1]


def test_another_dtype(checkpoint: str, tmp_path: Path) -> None:
    export(checkpoint, str(tmp_path / "whole"))
    export(checkpoint, str(tmp_path / "half"), dtype="bfloat16")
    whole, half = (
        AutoModelForCausalLM.from_pretrained(tmp_path / n, dtype="auto") for n in ("whole", "half")
    )
    assert (whole.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    for name, value in half.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name].bfloat16()), name
    ratio = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("half", "whole")]
    assert 0.4 < ratio[0] / ratio[1] < 0.6


def test_another_tokenizer(checkpoint: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "words")
    save_model(tmp_path / "model", "qwen2", True)
    (tmp_path / "words/config.json").write_text((tmp_path / "model/config.json").read_text())
    export(checkpoint, str(tmp_path / "out"), tokenizer=str(tmp_path / "words"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_from_the_command_line(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main(["export", "--ckpt_path", checkpoint, "--output", str(out), "--dtype", "float64"])
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith("step 2: ") and line.endswith(f"MB of weights written to {out}")
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.float64


def test_what_cannot_be_exported_is_refused_in_one_line(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "model", "qwen2", True)
    foreign, here = tmp_path / "foreign.ckpt", str(tmp_path / "out")
    torch.save({"loops": {}, "state_dict": {}}, foreign)
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(Path(checkpoint).read_bytes()[:5000])
    cases: list[tuple[list[str], str]] = [
        (["--ckpt_path", checkpoint, "--output", model], "`output` must be a folder without a"),
        (["--ckpt_path", "nothing.ckpt", "--output", here], "got nothing.ckpt"),
        (["--ckpt_path", model, "--output", here], "`ckpt_path` must be a"),
        (["--ckpt_path", f"{model}/model.safetensors", "--output", here], "`ckpt_path` must be a"),
        (["--ckpt_path", str(foreign), "--output", here], "a checkpoint of a KDRLModule"),
        (["--ckpt_path", str(broken), "--output", here], "an intact checkpoint of this library"),
        (["--ckpt_path", checkpoint, "--output", here, "--dtype", "float31"], "got float31"),
        (["--ckpt_path", checkpoint, "--output", here, "--dtype", "int64"], "got int64"),
        (["--ckpt_path", checkpoint, "--output", here, "--tokenizer", "/no/where"], "/no/where"),
        (["--ckpt_path", checkpoint], "output"),
        (["--ckpt_path", checkpoint, "--output", here, "--dytpe", "float32"], "dytpe"),
    ]
    for flags, words in cases:
        with pytest.raises(SystemExit) as error:
            main(["export", *flags])
        assert error.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], lines
        assert not Path(here).exists()


def test_a_student_that_is_gone_needs_a_tokenizer(tmp_path: Path) -> None:
    start = save_model(tmp_path / "start", "qwen2", True)
    _, path = trained(tmp_path, start)
    (tmp_path / "start").rename(tmp_path / "moved")
    with pytest.raises(ConfigurationError, match=r"got .*start"):
        export(path, str(tmp_path / "out"))
    export(path, str(tmp_path / "out"), tokenizer=str(tmp_path / "moved"))
    same_files(tmp_path / "out", tmp_path / "student")


def full_disk(*_: Any, **__: Any) -> None:
    raise SafetensorError("Error while serializing: No space left on device (os error 28)")


def test_a_run_that_cannot_write_its_student_gives_the_command_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, root = save_model(tmp_path / "start", "qwen2", True), tmp_path / "a run"
    _, path = trained(root, student)
    before = logits(root / "student")
    assert not torch.equal(before, logits(tmp_path / "start"))
    monkeypatch.setattr(Qwen2ForCausalLM, "save_pretrained", full_disk)
    words = (
        r"^the student must be writable to .*a run/version_1/student: got SafetensorError: .*No "
        r"space left on device .*\. Make room, and run `(python -m kdrl_lightning export .*)`\.$"
    )
    with (
        pytest.raises(TrainingStopped, match=words) as stopped,
        pytest.warns(UserWarning, match="run/version_1/student could not be written"),
    ):
        trained(root, student)
    match = r"`output` must be a folder that can be written: got \S+new \(SafetensorError: .*No"
    with pytest.raises(ConfigurationError, match=match):
        export(path, str(tmp_path / "new"))
    assert not list(tmp_path.rglob("*unfinished*")) and not (tmp_path / "new").exists()
    monkeypatch.undo()
    assert torch.equal(before, logits(root / "student"))  # of the run before
    found = re.match(words, str(stopped.value))
    assert found
    main(shlex.split(found[1])[3:])
    (name,) = (root / "version_1/checkpoints").iterdir()
    export(str(name), str(tmp_path / "new"))
    same_files(root / "version_1/student", tmp_path / "new")


def test_half_a_student_does_not_keep_a_full_disk_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(self: Any, path: str, **_: Any) -> None:
        Path(path).mkdir(parents=True)
        (Path(path) / "model.safetensors").write_bytes(b"half")
        full_disk()

    student = save_model(tmp_path / "start", "qwen2", True)
    monkeypatch.setattr(Qwen2ForCausalLM, "save_pretrained", half)
    with pytest.raises(TrainingStopped, match="No space left"), pytest.warns(UserWarning):
        trained(tmp_path / "run", student)
    assert not list((tmp_path / "run").rglob("*student*"))


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (None, r"The run saved no checkpoint: make room, and train again with checkpoints\."),
        (SimpleNamespace(last_model_path="", best_model_path="a b.ckpt"),
         r"run `python -m kdrl_lightning export --ckpt_path 'a b.ckpt' --output out`\."),
        (SimpleNamespace(last_model_path="last.ckpt", best_model_path="best.ckpt"),
         r"run `python -m kdrl_lightning export --ckpt_path last.ckpt --output out`\."),
    ],
)  # fmt: skip
def test_the_command_names_the_newest_checkpoint(callback: Any, words: str) -> None:
    module = SimpleNamespace(reduce=lambda value, operation: value)
    trainer = SimpleNamespace(checkpoint_callback=callback, lightning_module=module)
    with pytest.raises(TrainingStopped, match=words):
        export_together(trainer, full_disk, "out")


def test_all_ranks_stop_if_the_first_cannot_write() -> None:
    module = SimpleNamespace(reduce=lambda value, operation: value)
    trainer = SimpleNamespace(checkpoint_callback=None, lightning_module=module)
    words = r"^the student must be writable to out: got SafetensorError: .*\. The run saved no"
    with pytest.raises(TrainingStopped, match=words):
        export_together(trainer, full_disk, "out")
    module.reduce = lambda value, operation: value + 1.0  # another rank's failure
    with pytest.raises(TrainingStopped, match="another process had to stop"):
        export_together(trainer, lambda: None, "out")
