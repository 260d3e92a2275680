"""A mistake inside a value of several types names its cause and the nearest right name."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.program import made
from kdrl_lightning.__main__ import main

ROOT = Path(__file__).parents[3]
TEACHER = "--model.teacher={class_path: LocalTeacher, init_args: {model: "

CASES = {
    "an argument of a reward, by flag": (
        ["--data.reward=ExactMatch", "--data.reward.markr=x"],
        "`data.reward`: Option 'markr' is not accepted; did you mean marker?",
    ),
    "an argument of a reward": (
        ["--data.reward={class_path: ExactMatch, init_args: {markr: x}}"],
        "`data.reward`: Option 'markr' is not accepted; did you mean marker?",
    ),
    "an argument that is like none": (
        ["--data.reward={class_path: ExactMatch, init_args: {qqq: x}}"],
        "Option 'qqq' is not accepted; it has marker, answer_column",
    ),
    "the type of a reward's argument": (
        ["--data.reward={class_path: LengthPenalty, init_args: {max_tokens: x, buffer_tokens: 1}}"],
        "`data.reward.max_tokens` must be a whole number: got x.",
    ),
    "a reward in a reward": (
        [
            "--data.reward={class_path: WeightedRewards, init_args: {rewards: "
            "{a: {class_path: ExactMatch, init_args: {markr: x}}}}}"
        ],
        "`data.reward.rewards`: Option 'markr' is not accepted; did you mean marker?",
    ),
    "the name of a reward in a reward": (
        ["--data.reward={class_path: WeightedRewards, init_args: {rewards: {a: ExactMach}}}"],
        "must be a TaskReward or a function, by name or import path: got ExactMach; did you mean "
        "ExactMatch?",
    ),
    "a reward without what it needs": (
        ["--data.reward=LengthPenalty"],
        "`data.reward`: the following arguments are required: max_tokens, buffer_tokens",
    ),
    "a reward's value": (
        ["--data.reward={class_path: LengthPenalty, init_args: {max_tokens: 4, buffer_tokens: 9}}"],
        "`buffer_tokens` must be from 1 to max_tokens 4: got 9.",
    ),
    "a reward that is no reward": (
        ["--data.reward=3"],
        "`data.reward` must be a TaskReward or a function, by name or import path: got 3",
    ),
    "an argument of a function": (
        ["--data.reward=kdrl_lightning.tiny.addition_reward", "--data.reward.marker=x"],
        "`data.reward` must name a class before its argument marker: got addition_reward.",
    ),
    "a module that is not there": (
        ["--data.reward=no_module.reward"],
        "Problem with given class_path 'no_module.reward': No module named 'no_module'",
    ),
    "a flag of a prompt source": (
        ["--data.train_prompts.sise=3"],
        "`data.train_prompts`: Option 'sise' is not accepted; did you mean size?",
    ),
    "an argument of a prompt source": (
        ["--data.train_prompts={class_path: JSONLPrompts, init_args: {pth: x}}"],
        "`data.train_prompts`: Option 'pth' is not accepted; did you mean path?",
    ),
    "a prompt source": (
        ["--data.train_prompts=JSONLPromts"],
        "must be a PromptSource, by name or import path: got JSONLPromts; did you mean "
        "JSONLPrompts?",
    ),
    "a missing file of a named set": (
        [
            "--data.val_prompts={ood: {prompts: {class_path: JSONLPrompts, init_args: "
            "{path: /no/file}}}}"
        ],
        "`path` must be a JSON Lines file: got /no/file, which is not a file. Check",
    ),
    "an argument in a named set": (
        ["--data.val_prompts={ood: {prompts: {class_path: JSONLPrompts, init_args: {pth: x}}}}"],
        "`data.val_prompts.prompts`: Option 'pth' is not accepted; did you mean path?",
    ),
    "a setting of a named set": (
        ["--data.val_prompts={ood: {prompts: [{prompt: x}], sampels: 3}}"],
        "`data.val_prompts`: Option 'sampels' is not accepted; did you mean samples?",
    ),
    "a flag of a model source": (
        ["--model.student.slop=0.5"],
        "`model.student`: Option 'slop' is not accepted; did you mean slip?",
    ),
    "a model source": (
        ["--model.student={class_path: kdrl_lightning.tiny.TinyModle}"],
        "module 'kdrl_lightning.tiny' has no attribute 'TinyModle'; did you mean TinyModel?",
    ),
    "a group of settings": (["--modle.student=x"], "did you mean model?"),
    "an argument of a teacher": (
        [f"{TEACHER}x, dtpe: float32}}}}"],
        "`model.teacher`: Option 'dtpe' is not accepted; did you mean dtype?",
    ),
    "an argument of a teacher's model source": (
        [f"{TEACHER}{{class_path: kdrl_lightning.tiny.TinyModel, init_args: {{rle: x}}}}}}}}"],
        "`model.teacher.model`: Option 'rle' is not accepted; did you mean role?",
    ),
    "a teacher": (
        ["--model.teacher=LocalTeecher"],
        "`model.teacher` must be a Teacher, by name or import path: got LocalTeecher; did you mean "
        "LocalTeacher?",
    ),
    "an argument of a callback": (
        ["--trainer.callbacks=[{class_path: CPUThreads, init_args: {thrds: 1}}]"],
        "`trainer.callbacks`: Option 'thrds' is not accepted; did you mean threads?",
    ),
    "a callback": (
        ["--trainer.callbacks=[CPUThread]"],
        "must be a Callback, by name or import path: got CPUThread; did you mean CPUThreads?",
    ),
    "a schedule in a callback": (
        [
            "--trainer.callbacks=[{class_path: CoefficientSchedule, init_args: {coefficient: x, "
            "schedule: {class_path: Linear, init_args: {strt: 1}}}}]"
        ],
        "`trainer.callbacks.schedule`: Option 'strt' is not accepted; did you mean start?",
    ),
    "an argument of a logger": (
        ["--trainer.logger={class_path: CSVLogger, init_args: {save_dri: x}}"],
        "`trainer.logger`: Option 'save_dri' is not accepted; did you mean save_dir?",
    ),
    "an argument of the optimizer": (
        ["--model.optimizer.lrr=1"],
        "`model.optimizer`: Option 'lrr' is not accepted; did you mean lr?",
    ),
    "an optimizer": (
        ["--model.optimizer=AdamV"],
        "by name or import path: got AdamV; did you mean Adam",
    ),
    "an argument of the objective's part": (
        ["--model.objective.selection=[{class_path: Gates, init_args: {alignment_treshold: 1}}]"],
        "Option 'alignment_treshold' is not accepted; did you mean alignment_threshold?",
    ),
    "an optimizer of a module": (
        ["--model.optimizer=torch.optim.AdamWW"],
        "`model.optimizer`: module 'torch.optim' has no attribute 'AdamWW'; did you mean AdamW?",
    ),
    "a scheduler of a module": (
        ["--model.lr_scheduler={class_path: torch.optim.lr_scheduler.CosineAnealingLR}"],
        "has no attribute 'CosineAnealingLR'; did you mean CosineAnnealingLR?",
    ),
    "a class of ours": (
        ["--model.teacher={class_path: kdrl_lightning.LocalTeachr, init_args: {model: x}}"],
        "has no attribute 'LocalTeachr'; did you mean LocalTeacher?",
    ),
    "one of several words": (
        ["--trainer.precision=bf17"],
        "`trainer.precision` must be one of 64, 32, 16, transformer-engine,",
    ),
    "a source in place of a set": (
        ["--data.val_prompts={a: {class_path: JSONLPrompts, init_args: {path: x}}}"],
        "`data.val_prompts` must be settings of an EvalSet, such as `prompts`: got JSONLPrompts.",
    ),
    "rows in place of a set": (
        ["--config", "data: {val_prompts: null}", "--data.val_prompts={a: [{prompt: x}]}"],
        "`data.val_prompts` must be settings of an EvalSet, such as `prompts`: got [{'prompt': "
        "'x'}]. Put it under its setting.",
    ),
    "a number of another kind": (
        ["--trainer.max_steps=1:30"],
        "`trainer.max_steps` must be a whole number: got 1:30.",
    ),
    "a model in place of a teacher": (
        ["--model.teacher=Qwen/Qwen2.5-7B"],
        "`model.teacher` must be a Teacher: got the path Qwen/Qwen2.5-7B. Write {class_path: "
        "LocalTeacher, init_args: {model: Qwen/Qwen2.5-7B}}.",
    ),
    "a file of rows in place of a source": (
        ["--data.train_prompts=rows.jsonl"],
        "`data.train_prompts` must be a PromptSource: got the path rows.jsonl. Write {class_path: "
        "HFPrompts, init_args: {path: rows.jsonl}}.",
    ),
    "one class in place of a list": (
        ["--model.objective.selection={class_path: Gates}"],
        "`model.objective.selection` must be a list: got {'class_path': 'Gates'",
    ),
    "one of two words": (
        [
            "--trainer.callbacks=[{class_path: LearningRateMonitor, init_args: "
            "{logging_interval: stp}}]"
        ],
        "`trainer.callbacks.logging_interval` must be one of step, epoch: got stp.",
    ),
    "arguments without a class": (
        ["--model.teacher=null", "--model.teacher={path: x}"],
        "`model.teacher` must name a class of type Teacher: got arguments without `class_path`.",
    ),
    "a logger whose package is missing": (
        ["--trainer.logger=CometLogger"],
        "`CometLogger` must be possible to build: got ModuleNotFoundError: ",
    ),
    "rows that are no rows": (
        ["--data.train_prompts=[1, 2]"],
        "`data.train_prompts`: Expected a <class 'collections.abc.Mapping'>. Got value: 1",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_cause_is_named(
    case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags, words = CASES[case]
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(ROOT / "configs/rlad.yaml"), *flags])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line and "Union" not in line and "Namespace" not in line
    assert not list(tmp_path.iterdir())


def test_a_class_may_be_named_by_its_class_path(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data.teacher_completions.engine.class_path=TransformersEngine"]
    flags += ["--data.teacher_completions.engine.init_args.max_sequences=7", "--print_config"]
    with pytest.raises(SystemExit) as ended:
        main(["fit", *flags])
    assert ended.value.code in (0, None)
    assert "max_sequences: 7" in capsys.readouterr().out


MODULES = {
    "zero.py": ("x = 1\ny = x / 0\n", "ZeroDivisionError: division by zero (zero.py, line 2)"),
    "wrong.py": ("def f(:\n", "SyntaxError: invalid syntax (wrong.py, line 1)"),
    "needs.py": (
        "import no_package\n",
        "ModuleNotFoundError: No module named 'no_package' (needs.py, line 1)",
    ),
    "ends.py": ("import sys\n\nsys.exit('usage')\n", "SystemExit: usage (ends.py, line 3)"),
    "base.py": (
        "from kdrl_lightning.rewards import Reward\n\n\nclass Mine(Reward): ...\n",
        "TypeError: cannot create 'types.UnionType' instances (base.py, line 4)",
    ),
}


@pytest.mark.parametrize("file", MODULES)
@pytest.mark.parametrize("setting", ["data.reward", "model.teacher", "trainer.callbacks"])
def test_a_module_that_fails_is_named_with_its_line(
    file: str,
    setting: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    text, words = MODULES[file]
    (tmp_path / file).write_text(text)
    name = f"{file.removesuffix('.py')}.Mine"
    value = f"[{{class_path: {name}}}]" if setting == "trainer.callbacks" else name
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(ROOT / "configs/rlad.yaml"), f"--{setting}={value}"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    rule = f"error: `{setting}` must name a module that can be imported: got {name}, which raises "
    assert line.startswith(f"{rule}{words}. Correct the module.")


def test_an_error_in_a_users_constructor_is_named_with_its_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    code = "from lightning.pytorch import Callback\n\n\nclass Mine(Callback):\n"
    code += "    def __init__(self, file: str) -> None:\n        open(file)\n"
    (tmp_path / "mine_that_fails.py").write_text(code)
    value = "[{class_path: mine_that_fails.Mine, init_args: {file: no_file}}]"
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(ROOT / "configs/rlad.yaml"), f"--trainer.callbacks={value}"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == (
        "error: `Mine` must be possible to build: got FileNotFoundError: [Errno 2] No such file or "
        "directory: 'no_file' (mine_that_fails.py, line 6). Correct its settings, or install what "
        "it needs."
    )


def test_a_default_that_is_an_enumeration_can_be_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The default of Timer's `interval` is a member of a `StrEnum`."""
    timer = "[{class_path: Timer, init_args: {duration: 00:00:00:01}}]"
    trainer = made("--config", str(ROOT / "configs/rlad.yaml"), f"--trainer.callbacks={timer}")
    assert any(type(one).__name__ == "Timer" for one in trainer.trainer.callbacks)
