"""The student is saved at the end of a run, whatever else fails; checks run before training."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from helpers import moe_models
from helpers.odd_models import plain, state_space
from helpers.short_runs import make_data, make_module, make_trainer
from kdrl_lightning import GRPO
from kdrl_lightning.callbacks import FSDPCheckpoint, RunReport, SamplePage, SelectiveImitationStats
from kdrl_lightning.callbacks.base import RolloutCallback
from kdrl_lightning.cli.export import export
from kdrl_lightning.errors import ConfigurationError, TrainingStopped
from kdrl_lightning.models.loading import build_causal_lm, load_causal_lm
from kdrl_lightning.models.weights import ModelWeights
from kdrl_lightning.trainer.checks import monitors
from kdrl_lightning.trainer.end_of_run import check_space, checkpoint_bytes, student_bytes

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*of the (completions|groups):UserWarning",
    "ignore:The number of training batches:UserWarning",
    "ignore:.*generation flags:UserWarning",
)


def fit(
    root: Path,
    student: str,
    *callbacks: pl.Callback,
    data: dict[str, Any] | None = None,
    **trainer: Any,
) -> Any:
    settings = {"max_steps": 2, "enable_checkpointing": True, **trainer}
    saver = FSDPCheckpoint(monitor=None)
    out = make_trainer(root, callbacks=[*callbacks, RunReport(evaluate_teacher=False), saver],
                       **settings)  # fmt: skip
    module = make_module(student, None, GRPO())
    out.fit(module, datamodule=make_data(**{"val_prompts": None, **(data or {})}))
    return module


class Gap(RolloutCallback):
    """Logs a mean over nothing."""

    def on_step_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.log_step({"policy/gap": None})


class Logs(pl.Callback):
    """Logs at the end of an epoch only."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.log("mine", 1.0)


class Steps(pl.Callback):
    """Counts optimizer steps."""

    count = 0

    def on_before_zero_grad(self, *_: Any) -> None:
        self.count += 1


@pytest.fixture
def logs_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The callbacks of this file count as the library's: nobody else logs a metric."""
    monkeypatch.setattr(monitors, "KNOWN", (*monitors.KNOWN, Steps.__module__))


def check_student(root: Path, module: Any = None) -> None:
    """Check that a trained student is there, whole."""
    weights = load_file(root / "student/model.safetensors")
    assert AutoModelForCausalLM.from_pretrained(root / "student")
    assert (root / "student/tokenizer.json").exists() and not list(root.glob("*.unfinished"))
    if module is not None:
        wanted = dict(module.weights().named_tensors())
        assert all(torch.equal(value, wanted[name]) for name, value in weights.items())


# ---- configurations that transformers reads and does not write


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6},
        {"top_p": 0.9, "top_k": 20},
        {"do_sample": False, "min_p": 0.1},
        {"length_penalty": 2.0},
        {"early_stopping": True},
        {"typical_p": 0.5},
    ],
)
def test_a_generation_configuration_goes_out_as_it_came_in(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    start = plain(tmp_path / "start", **settings)
    with pytest.raises(ValueError, match="is invalid"):
        GenerationConfig.from_pretrained(start).validate(strict=True)
    module = fit(tmp_path / "run", start)
    check_student(tmp_path / "run", module)
    file = "generation_config.json"
    before, after = (
        json.loads((folder / file).read_text())
        for folder in (Path(start), tmp_path / "run/student")
    )
    assert after == before and after.items() >= settings.items()
    export(str(tmp_path / "run/checkpoints/step=00000002.ckpt"), str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / file).read_text()) == after


def test_an_infinite_setting_survives_checkpoint_and_export(tmp_path: Path) -> None:
    start = state_space(tmp_path / "start")
    model = load_causal_lm(start)
    assert model.config.time_step_limit[1] == float("inf")
    config = model.config.to_json_string(use_diff=False)  # as a checkpoint holds it
    built = build_causal_lm(config, model.generation_config.to_json_string(), model.state_dict())
    assert list(built.config.time_step_limit) == [0.0, float("inf")]
    for name, own in (("a", model), ("b", built)):
        ModelWeights(own, start).save(str(tmp_path / name))
        assert list(AutoConfig.from_pretrained(tmp_path / name).time_step_limit)[1] == float("inf")
        ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / name, Path(start)))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_parts_of_a_configuration_that_refuse_their_general_settings_are_read() -> None:
    """DBRX: a checkpoint's whole configuration holds them in its parts, too."""
    model = moe_models.build("dbrx", torch.float32)
    config = model.config.to_json_string(use_diff=False)
    built = build_causal_lm(config, None, model.state_dict())
    for part in ("attn_config", "ffn_config"):
        ours, theirs = (getattr(m.config, part).to_dict() for m in (built, model))
        ours["label2id"] = theirs["label2id"]  # of classifiers; transformers makes them again
        assert ours == theirs
    assert built.config.ffn_config.moe_num_experts == 4
    assert built.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("what", ["configuration", "tokenizer"])
def test_what_cannot_be_saved_is_found_before_training(
    tmp_path: Path, student_folder: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise TypeError("Object of type Thing\nis not JSON serializable")

    module = make_module(student_folder, None, GRPO())
    owner = AutoConfig.from_pretrained(student_folder) if what == "configuration" else (
        module.tokenizer)  # fmt: skip
    monkeypatch.setattr(type(owner), "save_pretrained", refuse)
    words = rf"the student's {what} must be one that.*TypeError: Object of type Thing is not JSON"
    with pytest.raises(ConfigurationError, match=words):
        fit(tmp_path, student_folder)
    assert not (tmp_path / "checkpoints").exists()


def test_so_it_is_for_lightnings_own_checkpoints(tmp_path: Path, student_folder: str) -> None:
    words = r"of ModelCheckpoint must be a metric that is logged: got val/accuracy without a valid"
    with pytest.raises(ConfigurationError, match=words):
        fit(tmp_path, student_folder, ModelCheckpoint(monitor="val/accuracy"))


@pytest.mark.parametrize(
    ("monitor", "words"),
    [
        (
            "reward/men",
            r"`monitor` of EarlyStopping must .*: got reward/men\. Did you mean rewa",
        ),
        ("val_loss", r"must be a metric that is logged: got val_loss\. Known: .*loss/total"),
    ],
)
@pytest.mark.usefixtures("logs_nothing_else")
def test_a_metric_of_training_that_does_not_come_stops_after_the_first_step(
    tmp_path: Path, student_folder: str, monitor: str, words: str
) -> None:
    steps = Steps()
    with pytest.raises(ConfigurationError, match=words):
        fit(tmp_path, student_folder, steps, EarlyStopping(monitor), max_steps=8)
    assert steps.count == 1


@pytest.mark.usefixtures("logs_nothing_else")
def test_a_metric_without_a_value_at_the_end_of_an_epoch_does_not_end_the_run(
    tmp_path: Path, student_folder: str
) -> None:
    stop = EarlyStopping("policy/gap")
    fit(tmp_path, student_folder, Gap(), stop, max_steps=8)
    assert json.loads((tmp_path / "summary.json").read_text())["optimizer_steps"] == 8


def test_callbacks_of_others_may_log_what_they_like(tmp_path: Path, student_folder: str) -> None:
    fit(tmp_path, student_folder, Logs(), EarlyStopping("mine"), max_steps=4)
    fit(tmp_path / "without", student_folder, Without())
    assert (tmp_path / "without/summary.json").exists()


class Without(pl.Callback):
    """Switches the export off."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, RunReport):
                callback.export = False


# ---- something else fails at the end


class Fails(pl.Callback):
    """Raises in one hook, after the last step or within the run."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.fail)

    def fail(self, *_: Any, **__: Any) -> None:
        raise KeyError("someone's callback")


@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end", "on_train_epoch_end"])
@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
@pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning")
def test_a_callback_that_fails_does_not_cost_the_student(
    tmp_path: Path, student_folder: str, hook: str, strategy: str
) -> None:
    try:
        with pytest.raises(KeyError, match="someone's callback"):
            fit(tmp_path, student_folder, Fails(hook), strategy=strategy, devices=1)
    finally:
        if strategy == "fsdp2" and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    check_student(tmp_path)
    saved = torch.load(tmp_path / "checkpoints/step=00000002.ckpt") if strategy == "auto" else {}
    for name, value in load_file(tmp_path / "student/model.safetensors").items():
        wanted = saved.get("state_dict", {}).get(f"student.model.{name}", value)
        assert torch.equal(value, wanted), name


def test_before_the_first_step_there_is_nothing_to_save(
    tmp_path: Path, student_folder: str
) -> None:
    with pytest.raises(KeyError):
        fit(tmp_path, student_folder, Fails("on_train_start"))
    assert not (tmp_path / "student").exists()


def test_pictures_and_pages_that_fail_are_a_warning(
    tmp_path: Path, student_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no fonts\nhere")

    for place in ("report.plot_curves", "imitation_stats.plot_imitation", "samples.render"):
        monkeypatch.setattr(f"kdrl_lightning.callbacks.{place}", fail)
    with pytest.warns(UserWarning, match="could not be written: OSError: no fonts here") as found:
        module = fit(tmp_path, student_folder, SamplePage(), SelectiveImitationStats())
    texts = [str(w.message) for w in found if "could not be written" in str(w.message)]
    assert sorted(Path(text.split()[0]).name for text in texts) == [
        "curves.png", "imitation.png", "samples.html"]  # fmt: skip
    check_student(tmp_path, module)
    assert json.loads((tmp_path / "summary.json").read_text())["optimizer_steps"] == 2


def test_a_tokenizer_that_fails_at_the_end_is_a_warning(
    tmp_path: Path, student_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaks(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            def fail(*_: Any) -> None:
                raise RuntimeError("gone")

            monkeypatch.setattr(type(pl_module.tokenizer), "save_pretrained", fail)

    with pytest.warns(UserWarning, match="tokenizer could not be written: RuntimeError: gone"):
        fit(tmp_path, student_folder, Breaks())
    assert load_file(tmp_path / "student/model.safetensors")


def test_a_full_disk_at_the_end_leaves_no_half_of_a_student(
    tmp_path: Path, student_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, path: str, writes: bool = True) -> None:
        Path(path).mkdir()
        (Path(path) / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ModelWeights, "save", full)
    words = r"the student must be writable to .*student: got OSError: .*No space left on device\. "
    with (
        pytest.raises(TrainingStopped, match=words),
        pytest.warns(UserWarning, match="student could not be written"),
    ):
        fit(tmp_path, student_folder)
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    ("optimizer", "moments"),
    [
        (lambda p: torch.optim.AdamW(p), 2.0),
        (lambda p: torch.optim.SGD(p, lr=0.1), 0.0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1.0),
        (lambda p: torch.optim.LBFGS(p), 0.0),
    ],
)
def test_the_sizes_are_those_of_the_files(
    tmp_path: Path, student_folder: str, optimizer: Any, moments: float
) -> None:
    module = make_module(student_folder, None, GRPO())
    module.optimizer_callable = optimizer
    module.configure_model()
    weights = (Path(student_folder) / "model.safetensors").stat().st_size
    assert student_bytes(module) == pytest.approx(weights, rel=0.05)
    assert checkpoint_bytes(module) == pytest.approx(weights * (1 + moments), rel=0.05)


@pytest.mark.parametrize(("free", "fits"), [(4.1, True), (3.9, False), (0.5, False)])
def test_a_disk_without_room_is_found_before_training(
    tmp_path: Path,
    student_folder: str,
    monkeypatch: pytest.MonkeyPatch,
    free: float,
    fits: bool,
) -> None:
    """Room for a student, and a checkpoint of weights and two moments, in units of a student."""
    size = (Path(student_folder) / "model.safetensors").stat().st_size
    usage = SimpleNamespace(free=round(free * size))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    if fits:
        fit(tmp_path, student_folder)
        return
    words = r"the disk of .* must have .* GB free for the trained student and a checkpoint: got"
    with pytest.raises(ConfigurationError, match=words):
        fit(tmp_path, student_folder)
    assert not (tmp_path / "checkpoints").exists()


def test_a_folder_that_cannot_be_written_is_found_before_training(
    tmp_path: Path, student_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text("")
    place = tmp_path / "run.yaml/saved"
    words = rf"^`{place}` must be a folder that the run can write: got .*run\.yaml, which is not a "
    with pytest.raises(ConfigurationError, match=words):
        check_space({place: 1})
    out = make_trainer(
        tmp_path, callbacks=[FSDPCheckpoint(str(place))], max_steps=1, enable_checkpointing=True
    )
    with pytest.raises(ConfigurationError, match=words):
        out.fit(make_module(student_folder, None, GRPO()), datamodule=make_data(val_prompts=None))
    check_space({tmp_path / "new/folder": 1})
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigurationError, match=r"may not be written \(Permission denied\)\. Na"):
        check_space({tmp_path / "new/folder": 1})
    read_only = SimpleNamespace(f_flag=os.ST_RDONLY)
    monkeypatch.setattr(os, "statvfs", lambda path: read_only)
    with pytest.raises(ConfigurationError, match=r"be written \(Read-only file system\)\. Nam"):
        check_space({tmp_path / "new/folder": 1})


# ---- early stopping


def test_early_stopping_without_a_validation_does_not_stop_the_end(
    tmp_path: Path, student_folder: str
) -> None:
    """An epoch has four steps; the run ends after two, before its validation."""
    stop = EarlyStopping("val/accuracy", mode="max")
    words = "EarlyStopping never gets val/accuracy: the first .* after 4 optimizer steps, and `max_"
    with pytest.warns(UserWarning, match=words):
        module = fit(tmp_path, student_folder, stop, data={"val_prompts": make_data().val_prompts})
    check_student(tmp_path, module)
    assert json.loads((tmp_path / "summary.json").read_text())["optimizer_steps"] == 2


def test_early_stopping_still_stops(tmp_path: Path, student_folder: str) -> None:
    stop = EarlyStopping("val/accuracy", mode="max", patience=1, min_delta=2.0)
    data = {"val_prompts": make_data().val_prompts, "rollouts_per_epoch": 1}
    fit(tmp_path, student_folder, stop, data=data, max_steps=20)
    # The first validation sets the best value, the second does not beat it.
    assert json.loads((tmp_path / "summary.json").read_text())["optimizer_steps"] == 4


@pytest.mark.parametrize(
    ("monitor", "data", "words"),
    [
        ("val/accuracy", {}, r"of EarlyStopping must be a metric that is logged: got val/accuracy"),
        ("val/luck", {"val_prompts": make_data().val_prompts},
         r"`monitor` must be a metric of the validation: got val/luck\. Known: .*val/accuracy"),
    ],
)  # fmt: skip
def test_a_metric_that_does_not_come_is_refused_before_training(
    tmp_path: Path, student_folder: str, monitor: str, data: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        fit(tmp_path, student_folder, EarlyStopping(monitor), data=data, num_sanity_val_steps=-1)
    assert not (tmp_path / "checkpoints").exists()
