"""Whole runs of LoRA students: what trains, what a checkpoint holds, resume and export."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from torch import Tensor

from helpers.program import addition_run
from helpers.resumed_runs import Run, Setting, run, same_batches, same_weights
from helpers.sharded_trainer import as_shards
from helpers.short_runs import make_data, make_module, make_trainer, trained
from kdrl_lightning import GRPO, KDRL, AdapterOffTeacher, LoRA
from kdrl_lightning.__main__ import main
from kdrl_lightning.cli.export import export
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.models.lora import is_adapter
from kdrl_lightning.models.sharding import load_scorer
from kdrl_lightning.models.weights import ModelWeights

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*of the (completions|groups):UserWarning",
        "ignore:The number of training batches:UserWarning",
        "ignore:torch.distributed is .*:UserWarning",
        "ignore:Be aware that when using `ckpt_path`:UserWarning",
    ),
]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, student_folder: str) -> tuple[Path, Any, str]:
    """A run of two steps: its folder, its module and its checkpoint."""
    root = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdrl_lightning.callbacks.report.plot_curves", lambda *_: None)
        return root, *trained(root, student_folder, LoRA(3, 12.0, ["q_proj", "up_proj"]))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, student_folder: str) -> str:
    """The checkpoint of a run that trains all weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdrl_lightning.callbacks.report.plot_curves", lambda *_: None)
        return trained(tmp_path_factory.mktemp("full"), student_folder, None)[1]


def test_the_base_stands_still_and_is_in_no_checkpoint(
    half: tuple[Path, Any, str], full: str, student_folder: str
) -> None:
    root, module, path = half
    base = dict(ModelWeights(load_causal_lm(student_folder), student_folder).named_tensors())
    for name, tensor in ModelWeights(module.student.model, "it", merged=False).named_tensors():
        assert torch.equal(tensor, base[name]), name
    for name, tensor in module.weights().named_tensors():
        moves = name.endswith(("q_proj.weight", "up_proj.weight"))
        assert torch.equal(tensor, base[name]) != moves, name
    adapters = [p for n, p in module.student.named_parameters() if is_adapter(n)]
    saved = torch.load(path)
    assert len(saved["state_dict"]) == len(adapters) == 4
    (moments,) = saved["optimizer_states"]
    assert len(moments["state"]) == 4
    count = sum(p.numel() for p in adapters)
    assert json.loads((root / "summary.json").read_text())["trainable_parameters"] == count
    held = [saved["state_dict"], *moments["state"].values()]
    assert sum(t.numel() for group in held for t in group.values() if t.dim()) == 3 * count
    assert os.path.getsize(path) < os.path.getsize(full) / 5


def test_stopped_behind_any_step_it_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, student_folder: str
) -> None:
    setting = Setting(
        student_folder,
        AdapterOffTeacher(),
        lambda: KDRL(0.5, ref_kl_coef=0.1),
        {"epochs_per_rollout": 2, "val_prompts": None},
        {"max_steps": 6},
        lora=lambda: LoRA(4),
    )
    whole = run(tmp_path / "whole", setting, save="steps")
    for step in (1, 4, 5):
        equal_from(step, whole, run(tmp_path / f"rest{step}", setting, whole.checkpoints[step]))


def equal_from(step: int, whole: Run, rest: Run) -> None:
    same_batches(whole.seen[step:], rest.seen)
    same_weights(whole.weights(), rest.weights())
    assert whole.logged()[-1]["loss/total"] == rest.logged()[-1]["loss/total"]


def test_the_adapters_of_a_run_follow_from_its_seed(tmp_path: Path, student_folder: str) -> None:
    def adapters(seed: int) -> dict[str, Tensor]:
        module = make_module(student_folder, None, GRPO(), lora=LoRA(4))
        make_trainer(tmp_path).validate(module, datamodule=make_data(seed=seed), verbose=False)
        return dict(module.state_dict())

    torch.manual_seed(1)
    first = adapters(5)
    torch.manual_seed(2)
    same_weights(first, adapters(5))
    alone = load_scorer(student_folder, torch.float32, lora=LoRA(4), seed=5).state_dict()
    same_weights(first, {f"student.{name}": value for name, value in alone.items()})
    assert not torch.equal(next(iter(first.values())), next(iter(adapters(6).values())))


@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
def test_files_of_other_strategies_are_read(tmp_path: Path, student_folder: str) -> None:
    """Their optimizers' states are numbered alike, though most parameters are frozen."""

    def setting(**changes: Any) -> Setting:
        trainer = {"max_steps": 4, "precision": "64-true", **changes}
        data = {"val_prompts": None}
        return Setting(
            student_folder,
            AdapterOffTeacher(),
            lambda: KDRL(0.5),
            data,
            trainer,
            lora=lambda: LoRA(4),
        )

    one, full = setting(), setting(strategy="fsdp2_full", devices=1)
    try:
        whole = run(tmp_path / "one", one, save="steps")
        spread = run(tmp_path / "full", full, save="steps")
        runs = [
            spread,
            run(tmp_path / "to", full, whole.checkpoints[2]),
            run(tmp_path / "back", one, spread.checkpoints[2]),
        ]
        for other in runs:
            for name, tensor in whole.weights().items():
                torch.testing.assert_close(other.weights()[name], tensor, rtol=0, atol=1e-12)
    finally:
        torch.distributed.destroy_process_group()


def resumed(root: Path, student: str, lora: LoRA | None, path: str, *, fits: bool = True) -> Any:
    module = make_module(student, None, GRPO(), lora=lora)
    trainer = make_trainer(root, max_steps=3)
    data = make_data()
    go = trainer.fit if fits else trainer.validate
    go(module, datamodule=data, ckpt_path=path)
    return module


SAME = {"rank": 3, "alpha": 12.0, "target_modules": ["up_proj", "q_proj"]}


@pytest.mark.parametrize(
    "change",
    [{"rank": 4}, {"alpha": 6.0}, {"target_modules": "all-linear"}, {"target_modules": ["q_proj"]}],
)
@pytest.mark.parametrize("fits", [True, False])
def test_other_adapters_are_refused(
    half: tuple[Path, Any, str], tmp_path: Path, student_folder: str, change: Any, fits: bool
) -> None:
    kind = {**SAME, **change}
    ours = f"rank {kind['rank']}, alpha {kind['alpha']}, target_modules "
    theirs = r"rank 3, alpha 12.0, target_modules \['q_proj', 'up_proj'\]"
    words = rf"`lora` must be that of the checkpoint: got adapters with {ours}.* holds .*{theirs}"
    with pytest.raises(ConfigurationError, match=words):
        resumed(tmp_path, student_folder, LoRA(**kind), half[2], fits=fits)


def test_adapters_and_all_weights_are_not_mixed_up(
    half: tuple[Path, Any, str], full: str, tmp_path: Path, student_folder: str
) -> None:
    with pytest.raises(ConfigurationError, match=r"got all weights, but .* holds adapters with"):
        resumed(tmp_path, student_folder, None, half[2])
    with pytest.raises(ConfigurationError, match=r"got adapters with .* holds all weights"):
        resumed(tmp_path, student_folder, LoRA(**SAME), full)  # type: ignore[arg-type]


@pytest.mark.parametrize("fits", [True, False])
def test_another_base_is_refused(
    half: tuple[Path, Any, str],
    tmp_path: Path,
    student_folder: str,
    teacher_folder: str,
    fits: bool,
) -> None:
    words = rf"`student` must be the base model .*got {teacher_folder}.*on {student_folder}"
    with pytest.raises(ConfigurationError, match=words):
        resumed(tmp_path, teacher_folder, LoRA(**SAME), half[2], fits=fits)  # type: ignore[arg-type]
    module = resumed(tmp_path, student_folder, LoRA(**SAME), half[2], fits=False)  # type: ignore[arg-type]
    same_weights(dict(half[1].weights().named_tensors()), dict(module.weights().named_tensors()))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(torch.arange(16)[None]).logits
    return out


@pytest.mark.parametrize("sharded", [False, True])
def test_export_merges_or_writes_the_adapter(
    half: tuple[Path, Any, str], tmp_path: Path, student_folder: str, sharded: bool
) -> None:
    root, module, path = half
    path = as_shards(path, tmp_path / "shards.ckpt") if sharded else path
    export(path, str(tmp_path / "merged"))
    own = {p.name: p.read_bytes() for p in (root / "student").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()} == own
    assert "adapter_config.json" not in own and "tokenizer.json" in own
    merged = load_causal_lm(str(tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), logits(module.student.model), rtol=0, atol=1e-5)

    export(path, str(tmp_path / "adapter"), adapter=True)
    names = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
                     "tokenizer_config.json"}  # fmt: skip
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 12.0)
    assert config["target_modules"] == ["q_proj", "up_proj"]
    assert config["base_model_name_or_path"] == student_folder
    base = load_causal_lm(student_folder)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(theirs), logits(module.student.model))
    assert not torch.equal(logits(theirs), logits(load_causal_lm(student_folder)))

    export(path, str(tmp_path / "half"), adapter=True, dtype="bfloat16")
    sizes = [(tmp_path / n / "adapter_model.safetensors").stat().st_size
             for n in ("half", "adapter")]  # fmt: skip
    assert sizes[0] < 0.7 * sizes[1]


def test_a_base_that_has_moved_is_named(
    tmp_path: Path, student_folder: str, teacher_folder: str
) -> None:
    start = tmp_path / "start"
    load_causal_lm(student_folder).save_pretrained(start)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (start / name).write_bytes((Path(student_folder) / name).read_bytes())
    _, path = trained(tmp_path, str(start), LoRA(2))
    start.rename(tmp_path / "moved")
    with pytest.raises(ConfigurationError, match=r"got .*start"):
        export(path, str(tmp_path / "out"))
    with pytest.raises(ConfigurationError, match=rf"`base` must be .*got {teacher_folder}, with"):
        export(path, str(tmp_path / "out"), base=teacher_folder)
    export(path, str(tmp_path / "out"), base=str(tmp_path / "moved"))
    ours, theirs = (tmp_path / n / "model.safetensors" for n in ("out", "student"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_what_cannot_be_exported_is_refused(
    half: tuple[Path, Any, str], full: str, tmp_path: Path, student_folder: str
) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(ConfigurationError, match=r"`adapter` must go with a LoRA student: got"):
        export(full, out, adapter=True)
    with pytest.raises(ConfigurationError, match=r"`base` must go with a LoRA student: got"):
        export(full, out, base=student_folder)
    export(half[2], out, adapter=True)
    with pytest.raises(ConfigurationError, match="`output` must be a folder without a model"):
        export(half[2], out)
    saved = torch.load(half[2])
    saved["state_dict"].popitem()
    torch.save(saved, tmp_path / "less.ckpt")
    with pytest.raises(ConfigurationError, match="`ckpt_path` must hold the adapters that it name"):
        export(str(tmp_path / "less.ckpt"), str(tmp_path / "less"))
    with pytest.raises(ConfigurationError, match="`ckpt_path` must hold the adapters that it name"):
        resumed(tmp_path, student_folder, LoRA(**SAME), str(tmp_path / "less.ckpt"))  # type: ignore[arg-type]


def test_from_the_command_line(
    tmp_path: Path,
    student_folder: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = addition_run(
        student_folder,
        objective={"class_path": "KDRL", "init_args": {"teacher_kl_coef": 0.1}},
        teacher={"class_path": "AdapterOffTeacher"},
        lora={"rank": 2, "target_modules": ["q_proj"]},
    )
    Path("run.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config=run.yaml", "--model.lora.rank=3", "--model.lora.alpha=6"])
    file = next(Path("runs").rglob("step=*.ckpt"))
    kind = torch.load(file)["kdrl_lightning"]["lora"]
    assert (kind["rank"], kind["alpha"], kind["target_modules"]) == (3, 6.0, ["q_proj"])
    main(["export", f"--ckpt_path={file}", "--output=adapter", "--adapter=true"])
    assert Path("adapter/adapter_model.safetensors").exists()
    for flags, words in (
        (["--model.lora.rank=0"], "`rank` must be at least 1: got 0."),
        (["--model.lora.dropout=0.05"], "`dropout` must be 0 for adapters: got 0.05."),
        (["--model.lora.target_modules=[query]"], "`target_modules` must name linear layers"),
        (["--model.lora=null"], "`teacher` must have a LoRA student to be its base"),
        (["--model.lora.rnk=2"], "rnk"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as error:
            main(["fit", "--config=run.yaml", *flags])
        assert error.value.code == 2
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert len(lines) == 1 and words in lines[0], lines
