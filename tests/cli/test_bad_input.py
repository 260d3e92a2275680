"""A user's mistake gets one clear line and a non-zero exit, before any training."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from helpers.program import addition_run
from kdrl_lightning.__main__ import main
from kdrl_lightning.tiny.models import Recipe, save_untrained

ROOT = Path(__file__).parents[2]


def raising(sample: object) -> float:
    raise KeyError("gold")


def not_a_number(sample: object) -> float:
    return float("nan")


@pytest.fixture
def config(tmp_path: Path, student_folder: str, teacher_folder: str) -> dict[str, object]:
    """RLAD on random models: everything but the mistake is right."""
    teacher = {"class_path": "LocalTeacher", "init_args": {"model": teacher_folder}}
    made = addition_run(student_folder, teacher=teacher, objective={"class_path": "RLAD"})
    made["trainer"] |= {
        "default_root_dir": str(tmp_path),
        "logger": False,
        "enable_checkpointing": False,
    }
    return made


def refuse(
    config: dict[str, object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    *flags: str,
) -> str:
    """Run fit, expect a refusal; return its one line."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as error:
        main(["fit", "--config", str(file), *flags])
    assert error.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert not (tmp_path / "summary.json").exists()
    return lines[0]


CASES = {
    "misspelt flag": (["--data.group_sise=3"], "did you mean group_size?"),
    "flag of another group": (
        ["--data.rollout.top_p=0.9"],
        "did you mean data.evaluation.top_p?",
    ),
    "misspelt class": (["--model.objective=RLADD"], "did you mean RLAD?"),
    "misspelt argument": (
        ["--model.objective.trrd_alfa=0.3"],
        "did you mean trrd_alpha? (see `python -m kdrl_lightning fit --help`)",
    ),
    "wrong type": (["--trainer.max_steps=many"], "trainer.max_steps"),
    "group of one": (["--data.rollout.group_size=1"], "`group_size` must be at least 2 for RLAD"),
    "no teacher": (["--model.teacher=null"], "`teacher` must be given for the objective RLAD"),
    "alpha": (["--model.objective.trrd_alpha=1.5"], r"`trrd_alpha` must be in [0, 1]: got 1.5"),
    "temperature": (["--data.rollout.temperature=0"], "`temperature` must be above 0"),
    "no such model": (["--model.student=/no/such/model"], "got /no/such/model"),
    "no such teacher": (["--model.teacher.model=/no/such/model"], "got /no/such/model"),
    "context": (
        ["--data.rollout.max_tokens=125"],
        "must have at most 3 tokens a prompt (context 128",
    ),
    "cut step": (
        ["--trainer.accumulate_grad_batches=2", "--trainer.limit_train_batches=3"],
        "`limit_train_batches` must not cut an optimizer step of 2 micro-batches",
    ),
    "no step": (
        ["--trainer.limit_train_batches=0"],
        "`limit_train_batches` must leave an optimizer step to train: got 0, which is 0 of",
    ),
    "no step at all": (
        ["--trainer.max_steps=0"],
        "`max_steps` must leave an optimizer step to train: got 0. Raise it; to train nothing, ",
    ),
    "no time": (
        ["--trainer.max_time=00:00:00:00"],
        "`max_time` must leave time to train: got 0 seconds. Raise it.",
    ),
    "a share of the validation": (
        ["--trainer.overfit_batches=0.5", "--data.rollout.rollouts_per_epoch=2"],
        "`overfit_batches`, which limits the validation too, must leave a batch of each set: got 0",
    ),
    "a share that is no step": (
        ["--trainer.limit_train_batches=0.001"],
        "`limit_train_batches` must leave an optimizer step to train: got 0.001, which is 0 of",
    ),
    "cut step of a few batches": (
        ["--trainer.accumulate_grad_batches=2", "--trainer.overfit_batches=3"],
        "`overfit_batches` must not cut an optimizer step of 2 micro-batches",
    ),
    "a package of the precision": (
        ["--trainer.precision=transformer-engine"],
        "Requirement 'transformer_engine>=0.11.0' not met.",
    ),
    "accumulation": (
        ["--trainer.accumulate_grad_batches=9"],
        "`accumulate_grad_batches` must be at most 8",
    ),
    "micro-batches that do not fit": (
        ["--data.rollout.max_tokens_per_micro_batch=60"],
        "got 60. Set `accumulate_grad_batches` 3.",
    ),
    "a completion that does not fit": (
        ["--data.rollout.max_tokens_per_micro_batch=10"],
        "got 10. One completion may have 18 with its prompt: lower `max_tokens`, or drop long "
        "prompts.",
    ),
    "uneven mini-batches": (
        ["--data.rollout.minibatches_per_rollout=3"],
        "`prompts_per_rollout` must be a multiple",
    ),
    "a schedule that cannot be": (
        [
            "--model.lr_scheduler=torch.optim.lr_scheduler.OneCycleLR",
            "--model.lr_scheduler.max_lr=0.1",
        ],
        "`optimizer` and `lr_scheduler` must have valid arguments: got You must define either "
        "total_steps",
    ),
    "a schedule that waits for a metric": (
        ["--model.lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau"],
        "`lr_scheduler` must be a schedule of steps: got ReduceLROnPlateau",
    ),
    "bf16 weights": (["--trainer.precision=bf16-true"], "Use bf16-mixed"),
    "reward raises": (["--data.reward=test_bad_input.raising"], "KeyError"),
    "reward is NaN": (["--data.reward=test_bad_input.not_a_number"], "must return a finite number"),
    "no such file": (
        ["--data.train_prompts=JSONLPrompts", "--data.train_prompts.path=/no/file.jsonl"],
        "/no/file.jsonl, which is not a file",
    ),
    "rows without prompt": (['--data.train_prompts=[{"question": "1"}]'], "the column `prompt`"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_line(
    case: str,
    config: dict[str, object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags, words = CASES[case]
    assert words in refuse(config, tmp_path, capsys, *flags)


def test_another_vocabulary_is_refused(
    config: dict[str, object],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path_factory.mktemp("other")
    save_untrained(Recipe(64, 1, 1, 1e-3, False), folder, seed=0)
    file = folder / "tokenizer.json"
    text = file.read_text()
    file.write_text(text.replace('"7"', '"@"').replace('"8"', '"7"').replace('"@"', '"8"'))
    assert AutoTokenizer.from_pretrained(folder).get_vocab()["7"] == 10
    line = refuse(config, tmp_path, capsys, f"--model.teacher.model={folder}")
    assert "must share one vocabulary" in line and "2 ids differ" in line


def test_unknown_subcommand_and_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    for args, words in (
        (["fti"], "got fti. Did you mean fit?"),
        (["fit", "--config", "/no/such.yaml"], "/no/such.yaml"),
    ):
        with pytest.raises(SystemExit) as error:
            main(args)
        assert error.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and words in lines[0]


@pytest.mark.filterwarnings("ignore:the reward failed on .* of an evaluation:UserWarning")
def test_a_reward_that_fails_later_is_counted_then_stops(
    config: dict[str, object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    flags = [
        "--data.reward=helpers.rewards.reward_that_fails_late.judge",
        "--trainer.num_sanity_val_steps=0",
    ]
    with pytest.raises(SystemExit) as error:
        main(["fit", "--config", str(file), *flags, "--report.evaluate_teacher=false"])
    assert error.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the reward failed on" in last and "ZeroDivisionError" in last


CLI_CASES = {
    "the best checkpoint of a command before": (
        ["--ckpt_path=best"],
        "`ckpt_path` must be a checkpoint: got best, which does not exist. Give a path, or `last`.",
    ),
    "misspelt reward": (["--data.reward=ExactMatsh"], "did you mean ExactMatch?"),
    "no such checkpoint": (["--ckpt_path=nothing.ckpt"], "`ckpt_path` must be a checkpoint"),
    "no such accelerator": (["--trainer.accelerator=abacus"], "abacus"),
    "no such devices": (
        ["--trainer.devices=many"],
        "`devices` selected with `CPUAccelerator` should be an int > 0. Got `trainer.devices: "
        "many`.",
    ),
    "an argument beside a class": (
        ["--data.train_prompts={class_path: JSONLPrompts, path: x}"],
        "`data.train_prompts` must have its arguments below `init_args`: got `path` next to "
        "`class_path`. Write it below `init_args`.",
    ),
    "arguments of no class": (
        ["--trainer.callbacks=[{init_args: {threads: 3}}]"],
        "`trainer.callbacks` must name a class of type Callback: got arguments without `class_pat",
    ),
    "an argument of a class that has none": (
        ["--trainer.callbacks=[{class_path: ProgressBar, init_args: {rows: 3}}]"],
        "Option 'rows' is not accepted; it has no arguments",
    ),
    "no such profiler": (["--trainer.profiler=simpel"], "Got `trainer.profiler: simpel`."),
    "no unit of time": (
        ["--trainer.max_time={minuts: 3}"],
        "`trainer.max_time` must have days, hours, minutes, seconds: got minuts. Correct the name.",
    ),
    "sanity checks of -5 batches": (
        ["--trainer.num_sanity_val_steps=-5"],
        "`trainer.num_sanity_val_steps` must be at least -1: got -5. -1 takes all batches.",
    ),
    "a log of every -1 steps": (
        ["--trainer.log_every_n_steps=-1"],
        "`trainer.log_every_n_steps` must be at least 0: got -1. 0 logs nothing.",
    ),
    "accumulation over no batches": (
        ["--trainer.accumulate_grad_batches=0"],
        "`trainer.accumulate_grad_batches` must be at least 1: got 0. It is the number of",
    ),
    "at least -5 steps": (
        ["--trainer.min_steps=-5"],
        "`trainer.min_steps` must be at least 0: got -5. 0 sets no minimum.",
    ),
    "a clip below 0, which clips nothing": (
        ["--trainer.gradient_clip_val=-1"],
        "`trainer.gradient_clip_val` must be at least 0: got -1. 0 clips nothing.",
    ),
    "null for a student": (
        ["--model.student=null"],
        "`model.student` must be given: got null. Leave it out to keep its value.",
    ),
    "no such strategy": (["--trainer.strategy=luck"], "luck"),
    "negative rate": (
        ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=-1"],
        "Invalid learning rate",
    ),
    "supervised loss on rollouts": (
        ["--model.objective=SFT"],
        "`group_size` must be 0 for SFT, which trains on given",
    ),
}


@pytest.mark.parametrize("case", CLI_CASES)
def test_what_lightning_or_torch_refuse_is_one_line_too(
    case: str, config: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, words = CLI_CASES[case]
    assert words in refuse(config, tmp_path, capsys, *flags)


@pytest.mark.parametrize("value", [5, [1]])
def test_a_value_in_place_of_a_group_is_refused(
    value: object, config: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refuse({**config, "samples": value}, tmp_path, capsys)
    words = f"`samples` must have settings by name: got {value}. Leave it out to keep its values."
    assert words in line


METHOD_CASES = {
    "alpha below 0": (
        ["--model.objective.trrd_alpha=-0.1"],
        "`trrd_alpha` must be in [0, 1]: got -0.1. 1 is GRPO, 0 anchors at the teacher.",
    ),
    "negative coefficient": (
        ["--model.objective=KDRL", "--model.objective.teacher_kl_coef=-1"],
        "`teacher_kl_coef` must be at least 0: got -1.0.",
    ),
    "selection that has nothing to select": (
        [
            "--model.objective=GRPO",
            '--model.objective.selection=[{"class_path": "Gates", "init_args": '
            '{"alignment_threshold": 1}}]',
            "--model.teacher=null",
        ],
        "`selection` must be used with a part that imitates the teacher: got Gates",
    ),
    "divergence without teacher": (
        ["--model.objective=GKD", "--model.teacher=null"],
        "`teacher` must be given for the objective GKD: got None.",
    ),
    "teacher completions without a rule": (
        ["--data.teacher_completions.count=2"],
        "`teacher_completions` must be 0 for RLAD without a rule for them: got 2. Give",
    ),
    "teacher completions without a teacher": (
        [
            "--model.objective=GRPO",
            "--model.objective.teacher_tokens=ShapedProbability",
            "--model.teacher=null",
            "--data.teacher_completions.count=2",
        ],
        "one that can generate for `teacher_completions` 2: got no teacher. Use a LocalTeacher, ",
    ),
    "a rule without teacher completions": (
        ["--model.objective=GRPO", "--model.objective.teacher_tokens=ShapedProbability"],
        "`teacher_completions` must be at least 1 for an objective with `teacher_tokens`: got 0.",
    ),
    "k1 by its name": (
        ["--model.objective=KDRL", "--model.objective.kl_estimator=k1"],
        "got k1. The expected gradient of k1 as a loss is zero.",
    ),
    "k1 as a loss": (
        [
            "--model.objective=PolicyObjective",
            "--model.objective.ratio=null",
            "--model.objective.advantage=null",
            '--model.objective.distill={"class_path": "SampledKL", "init_args": '
            '{"estimator": "k1"}}',
        ],
        "got k1. The expected gradient of k1 as a loss is zero.",
    ),
    "supervised loss with completions of the student": (
        ["--model.objective=SFT", "--data.teacher_completions.count=2"],
        "`group_size` must be 0 for SFT, which trains on given completions: got 2. Let the",
    ),
    "form against estimator": (
        [
            "--model.objective=KDRL",
            "--model.objective.form=advantage",
            "--model.objective.kl_estimator=full_vocabulary",
        ],
        "`form` must be joint for `kl_estimator`",
    ),
    "no completions at all": (
        ["--data.rollout.group_size=0"],
        "`group_size` must be at least 1 without `teacher_completions`: got 0.",
    ),
    "refills for an objective that compares nothing": (
        ["--model.objective=OnPolicyDistillation", "--data.rollout.max_refills=2"],
        "`max_refills` must be 0 for OnPolicyDistillation, which does not compare a group: got 2.",
    ),
    "penalty at another length": (
        [
            "--data.reward=LengthPenalty",
            "--data.reward.max_tokens=24",
            "--data.reward.buffer_tokens=4",
        ],
        "`max_tokens` of the reward must be that of the data, 8: got 24.",
    ),
}


@pytest.mark.parametrize("case", METHOD_CASES)
def test_methods_that_cannot_be_are_refused_in_one_line(
    case: str, config: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, words = METHOD_CASES[case]
    assert words in refuse(config, tmp_path, capsys, *flags)


SCHEDULE_CASES = {
    "end before start": (
        "trrd_alpha",
        {"class_path": "Linear", "init_args": {"start": 1.0, "end": 0.5, "end_step": 0}},
        "`end_step` must come after begin_step 0: got 0. For a jump, use Switch.",
    ),
    "another objective's coefficient": (
        "teacher_kl_coef",
        {"class_path": "Constant", "init_args": {"value": 0.5}},
        "`coefficient` must be one of RLAD's (",
    ),
}


@pytest.mark.parametrize("case", SCHEDULE_CASES)
def test_schedules_that_cannot_be_are_refused_in_one_line(
    case: str, config: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coefficient, schedule, words = SCHEDULE_CASES[case]
    arguments = {"coefficient": coefficient, "schedule": schedule}
    config["trainer"]["callbacks"] = [  # type: ignore[index]
        {"class_path": "CoefficientSchedule", "init_args": arguments}
    ]
    assert words in refuse(config, tmp_path, capsys)


def test_two_schedules_of_one_coefficient_are_refused_in_one_line(
    config: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    constant = {"class_path": "Constant", "init_args": {"value": 0.5}}
    arguments = {"coefficient": "teacher_kl_coef", "schedule": constant}
    config["trainer"]["callbacks"] = [  # type: ignore[index]
        {"class_path": "KLCoefficientAnnealing"},
        {"class_path": "CoefficientSchedule", "init_args": arguments},
    ]
    line = refuse(config, tmp_path, capsys, "--model.objective=KDRL")
    assert "`callbacks` must have one schedule for teacher_kl_coef: got 2." in line


def test_a_broken_cache_is_refused_in_one_line(
    config: dict[str, object],
    tmp_path: Path,
    teacher_folder: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "scores.db"
    file.write_bytes(b"this is no database" * 100)
    config["model"]["teacher"] = {  # type: ignore[index]
        "class_path": "CachedTeacher",
        "init_args": {
            "path": str(file),
            "teacher": {"class_path": "LocalTeacher", "init_args": {"model": teacher_folder}},
        },
    }
    line = refuse(config, tmp_path, capsys)
    assert "`path` must be a SQLite file that can be written: got" in line
    assert file.read_bytes().startswith(b"this is no database")


def test_a_row_without_a_teacher_stops_in_one_line(
    config: dict[str, object],
    tmp_path: Path,
    teacher_folder: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    local = {"class_path": "LocalTeacher", "init_args": {"model": teacher_folder}}
    config["model"]["teacher"] = {  # type: ignore[index]
        "class_path": "RoutedTeacher",
        "init_args": {"teachers": {"sums": local}},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as error:
        main(["fit", "--config", str(file), "--trainer.num_sanity_val_steps=0"])
    assert error.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(
        "error: row 0 of `train_prompts`: the column `teacher` of a prompt row must name one of "
        "sums"
    )


def test_a_file_that_is_not_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("trainer: {max_steps: 4\n")
    with pytest.raises(SystemExit) as error:
        main(["fit", "--config", str(file)])
    assert error.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "broken.yaml must be YAML" in lines[0]


@pytest.mark.filterwarnings("ignore:.*of the (completions|groups):UserWarning")
def test_an_own_config_file_is_never_overwritten(
    config: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del config["trainer"]["default_root_dir"]  # type: ignore[attr-defined]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    before = file.read_text()
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", "config.yaml", "--report.evaluate_teacher=false"])
    assert file.read_text() == before
    assert {p.name for p in tmp_path.iterdir()} == {"config.yaml", "runs"}
