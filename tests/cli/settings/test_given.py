"""Every setting that a user gives has its effect, or a line says that it has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.program import CONFIG, made, refused
from kdrl_lightning.cli.evaluate import make_parser, pruned, seeded
from kdrl_lightning.cli.layered_yaml import install, load_with_base
from kdrl_lightning.cli.settings.layers.merging import merge


@pytest.mark.parametrize(
    ("text", "flags", "seed"),
    [
        ("", [], 0),
        ("seed_everything: 3", [], 3),
        ("data: {seed: 5}", [], 5),
        ("data.seed: 5", [], 5),
        ("seed_everything: 3\ndata: {seed: 5}", [], 5),
        ("data: {seed: 5}", ["--seed_everything=7"], 5),
        ("data: {seed: 5}", ["--data.seed=6"], 6),
        ("data: {seed: 0}\nseed_everything: 9", [], 0),
        ("data: {seed: null}\nseed_everything: 9", [], 9),
        ("seed_everything: false", ["--data.seed=4"], 4),
        ("seed_everything: false", [], 0),
    ],
)
def test_the_seed_of_data_is_its_own(file: Path, text: str, flags: list[str], seed: int) -> None:
    Path("over.yaml").write_text(f"base: config.yaml\n{text}\n")
    for args in (["--config", "over.yaml"], ["--config=config.yaml", f"--config={text or '{}'}"]):
        data = made(*args, *flags).datamodule
        assert data.seed == data.evaluation.seed == data.collector.slots.seed == seed


def test_a_saved_configuration_follows_the_seed_of_its_next_run(file: Path) -> None:
    cli = made("--config", str(file), "--seed_everything=3")
    assert cli.datamodule.seed == 3 and cli.config.data.seed is None


def test_an_evaluation_takes_the_seed_of_data(file: Path) -> None:
    install()
    file.write_text(CONFIG + "seed_everything: 3\n")
    parser = make_parser()
    for flags, seed in (([], 3), (["--data.seed=4"], 4)):
        config = parser.parse_args(pruned(["--config", str(file), *flags]))
        with seeded(config):
            assert parser.instantiate_classes(config).data.seed == seed
    file.write_text(CONFIG + "data.seed: 5\n")
    assert parser.parse_args(pruned(["--config", str(file)])).data.seed == 5


def test_an_evaluation_leaves_out_a_runs_logger_and_takes_its_own(file: Path) -> None:
    install()
    file.write_text(CONFIG.replace("logger: false", "enable_progress_bar: true, logger: true"))
    parser = make_parser()
    trainer = parser.parse_args(pruned(["--config", str(file)])).trainer
    assert (trainer.logger, trainer.enable_progress_bar) == (False, False)
    asked = pruned(["--config", str(file), "--trainer.enable_progress_bar=true"])
    assert parser.parse_args(asked).trainer.enable_progress_bar is True


def test_an_evaluation_says_what_the_trainer_refuses(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--models.a=some/model", "--trainer.devices=many"]
    line = refused(capsys, "evaluate", "--config", str(file), *flags)
    assert line.startswith("`devices` selected with `CPUAccelerator`")


TWICE = "model: {student: a}\ntrainer: {max_steps: 1}\nmodel: {student: b}\n"


@pytest.mark.parametrize("where", ["config", "base", "overlay", "base of an overlay"])
def test_a_key_given_twice_is_refused(
    where: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("twice.yaml").write_text(TWICE)
    Path("over.yaml").write_text("base: twice.yaml\n")
    Path("next.yaml").write_text("base: over.yaml\n")
    flags = {
        "config": ["--config", "twice.yaml"],
        "base": ["--config", "over.yaml"],
        "overlay": ["--config", "config.yaml", "--config", "twice.yaml"],
        "base of an overlay": ["--config", "config.yaml", "--config", "next.yaml"],
    }[where]
    line = refused(capsys, "fit", *flags)
    assert "`model` must occur once in a mapping of" in line
    assert "twice.yaml: got it in line 1 and in line 3. Remove one." in line
    line = refused(capsys, "fit", "--config", TWICE)
    assert line.startswith("`config`: `model` occurs in lines 1 and 3")


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_key_given_twice_is_refused_by_the_other_subcommands(
    command: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("twice.yaml").write_text("output: a\nckpt_path: x\noutput: b\n")
    line = refused(capsys, command, "--config", "twice.yaml")
    assert "`output` must occur once in a mapping of twice.yaml: got it in line 1 and" in line


def test_a_key_given_twice_in_a_class_file_or_in_json_is_refused(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("teacher.yaml").write_text("class_path: LocalTeacher\ninit_args:\n  model: a\n  model: b")
    Path("data.yaml").write_text("rollout: {group_size: 2}\nseed: 1\nseed: 2\n")
    Path("config.json").write_text('{"trainer": {"max_steps": 1,\n"max_steps": 2}}')
    Path("over.yaml").write_text("base: config.yaml\nmodel: {teacher: teacher.yaml}\n")
    for flags, words in (
        (
            ["--config=config.yaml", "--model.teacher=teacher.yaml"],
            "teacher.yaml: got it in",
        ),
        (
            ["--config=over.yaml"],
            "`model.teacher.model` must occur once in a mapping of teacher.yaml",
        ),
        (["--config=config.yaml", "--data=data.yaml"], "`seed` must occur once in a mapping of"),
        (["--config=config.json"], "`max_steps` must occur once in a mapping of config.json"),
    ):
        assert words in refused(capsys, "fit", *flags)


def test_a_key_with_dots_and_without_is_twice_the_same(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(CONFIG + "trainer.max_steps: 5\n")
    line = refused(capsys, "fit", "--config", str(file))
    assert "`trainer.max_steps` must occur once in" in line
    assert "got it with dots and inside `trainer`. Remove one." in line


def test_a_base_that_is_no_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    for text, words in (
        ("base: [a.yaml, b.yaml]", "`base` must name one YAML file: got"),
        ("base: binary.yaml", "`base` must be readable UTF-8: got"),
    ):
        with pytest.raises(ValueError, match=words):
            load_with_base(text, str(tmp_path / "c.yaml"))


def test_a_configuration_that_is_no_text_is_refused(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    for args, words in (
        (["fit", "--config", "binary.yaml"], "`config` must be UTF-8: got binary.yaml"),
        (["evaluate", "--config", "binary.yaml"], "`config` must be UTF-8: got binary.yaml"),
        (["fit", "--config=config.yaml", "--data=binary.yaml"], "a file of settings must be UTF-8"),
    ):
        assert words in refused(capsys, *args)


def test_a_list_with_a_plus_is_added_to_that_of_the_base(file: Path) -> None:
    threads = "{class_path: CPUThreads, init_args: {threads: 1}}"
    file.write_text(CONFIG.replace("logger: false", f"logger: false, callbacks: [{threads}]"))
    Path("over.yaml").write_text("base: config.yaml\ntrainer: {callbacks+: [StepProfile]}\n")
    names = [type(c).__name__ for c in made("--config", "over.yaml").trainer.callbacks]
    assert {"CPUThreads", "StepProfile"} <= set(names)
    assert merge({"a+": [1]}, {"a+": [2]}) == {"a+": [1, 2]}
    assert merge({"a+": [1]}, {"a": [2]}) == {"a": [2]}


def test_one_class_by_two_names_keeps_its_arguments(file: Path) -> None:
    base = {"class_path": "RLAD", "init_args": {"trrd_alpha": 0.3}}
    full = {"class_path": "kdrl_lightning.RLAD", "init_args": {"clip_low": 0.1}}
    deep = {"class_path": "kdrl_lightning.objectives.RLAD"}
    both = {**full, "init_args": {"trrd_alpha": 0.3, "clip_low": 0.1}}
    assert merge(base, full) == both
    assert merge(both, deep) == {**both, **deep}
    assert merge(base, "RLAD") == merge(base, base) == base
    assert merge(base, "GRPO") == "GRPO"
    assert merge(full, {"class_path": "no_module.RLAD"}) == {"class_path": "no_module.RLAD"}


def test_classes_that_a_list_replaces_are_named(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = "{class_path: CPUThreads, init_args: {threads: 1}}"
    file.write_text(CONFIG.replace("logger: false", f"logger: false, callbacks: [{threads}]"))
    for given, lost in (("[StepProfile]", True), ("[StepProfile, CPUThreads]", False)):
        Path("over.yaml").write_text(f"base: config.yaml\ntrainer: {{callbacks: {given}}}\n")
        made("--config", "over.yaml")
        words = "`trainer.callbacks` replaces the list of its base, so CPUThreads has no effect."
        assert (words in capsys.readouterr().out) is lost


UNUSED = {
    "checkpoint.save_top_k": "trainer: {enable_checkpointing: false}\ncheckpoint: {save_top_k: 3}",
    "data.evaluation.samples": "data: {val_prompts: null, evaluation: {samples: 4, k: [4]}}",
    "trainer.limit_val_batches": "data: {val_prompts: null}\ntrainer: {limit_val_batches: 2}",
    "trainer.gradient_clip_algorithm": "trainer: {gradient_clip_val: null, "
    "gradient_clip_algorithm: value}",
    "data.teacher_completions.engine": "data: {teacher_completions: {engine: TransformersEngine}}",
}


@pytest.mark.parametrize("name", UNUSED)
def test_a_setting_without_effect_is_named(
    name: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("over.yaml").write_text(f"base: config.yaml\n{UNUSED[name]}\n")
    made("--config", "over.yaml")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("note: `") and f"`{name}`" in line and " no effect with `" in line


def test_settings_with_an_effect_are_no_matter(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(
        "--config",
        "config.yaml",
        "--checkpoint.save_top_k=3",
        "--data.evaluation.samples=2",
        "--data.evaluation.temperature=1",
        "--trainer.limit_val_batches=2",
    )
    assert capsys.readouterr().out == ""


def test_arguments_of_a_class_that_is_replaced_are_named(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = "KDRL, init_args: {teacher_kl_coef: 0.3, clip_low: 0.1}"
    file.write_text(CONFIG.replace("GRPO", given))
    cli = made("--config", str(file), "--model.objective=GRPO")
    assert cli.config.model.objective.init_args.clip_low == 0.1
    words = "GRPO replaces KDRL, so `teacher_kl_coef` of KDRL has no effect."
    assert capsys.readouterr().out == f"note: {words}\n"
    Path("over.yaml").write_text("base: config.yaml\nmodel: {objective: {class_path: GRPO}}\n")
    made("--config", "over.yaml")
    words = "`model.objective`: GRPO replaces KDRL, so `teacher_kl_coef`, `clip_low` of"
    assert words in capsys.readouterr().out


THREADS = "{class_path: CPUThreads, init_args: {threads: 1}}"


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.callbacks+=StepProfile", f"--trainer.callbacks+={THREADS}"],
        ["--trainer.callbacks+=[StepProfile]", f"--trainer.callbacks+=[{THREADS}]"],
        [
            *("--trainer.callbacks+=CPUThreads", "--trainer.callbacks.threads=1"),
            "--trainer.callbacks+=StepProfile",
        ],
        ["--config", f"trainer: {{callbacks: [{THREADS}]}}", "--trainer.callbacks+=StepProfile"],
    ],
)
def test_a_flag_with_a_plus_adds_to_the_list(
    file: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    names = {type(c).__name__ for c in made("--config", str(file), *flags).trainer.callbacks}
    assert {"StepProfile", "CPUThreads"} <= names and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.callbacks+=[CPUThreads]", "--trainer.callbacks=[StepProfile]"],
        ["--config", f"trainer: {{callbacks: [{THREADS}]}}", "--trainer.callbacks=StepProfile"],
        [
            *("--config", f"trainer: {{callbacks: [{THREADS}]}}"),
            *("--config", "trainer: {callbacks: [StepProfile]}"),
        ],
    ],
)
def test_a_later_list_names_what_it_drops(
    file: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    names = {type(c).__name__ for c in made("--config", str(file), *flags).trainer.callbacks}
    assert "StepProfile" in names and "CPUThreads" not in names
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        "note: `trainer.callbacks` replaces an earlier value, so CPUThreads has no effect. Write "
        "`callbacks+` to add to the list."
    )


def test_a_flag_given_twice_is_named(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--trainer.callbacks=StepProfile", f"--trainer.callbacks={THREADS}"]
    names = {type(c).__name__ for c in made("--config", str(file), *flags).trainer.callbacks}
    assert "CPUThreads" in names and "StepProfile" not in names
    words = "note: `--trainer.callbacks` is given 2 times: the last one counts.\n"
    assert capsys.readouterr().out == words
    flags = ["--trainer.max_steps=2", "--trainer.max_steps", "3", "--config", "{}", "--config={}"]
    assert made("--config", str(file), *flags).trainer.max_steps == 3
    assert capsys.readouterr().out == words.replace("callbacks", "max_steps")


@pytest.mark.parametrize(
    ("text", "clip"),
    [
        ("model.objective.init_args.clip_low: 0.1", 0.1),
        ("model.objective: {class_path: GRPO, init_args: {clip_low: 0.3}}", 0.3),
        ("model: {}\nmodel.objective.init_args.clip_low: 0.4", 0.4),
    ],
)
def test_names_with_dots_change_the_base(file: Path, text: str, clip: float) -> None:
    Path("over.yaml").write_text(f"base: config.yaml\n{text}\n")
    assert made("--config", "over.yaml").config.model.objective.init_args.clip_low == clip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "model.objective.init_args.clip_low: 0.1\n"
            "model.objective: {class_path: GRPO, init_args: {clip_low: 0.3}}",
            "`model.objective.init_args.clip_low` must occur once in over.yaml: got it with dots "
            "and inside `model.objective`. Remove one.",
        ),
        (
            "model.objective: GRPO\nmodel.objective.init_args.clip_low: 0.1",
            "`model.objective.init_args.clip_low` must occur once in over.yaml",
        ),
        (
            "trainer: {<<: {max_steps: 3}, <<: {max_steps: 4}}",
            "`<<` must occur once in a mapping of over.yaml",
        ),
    ],
)
def test_settings_that_hide_each_other_are_refused(
    file: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("over.yaml").write_text(f"base: config.yaml\n{text}\n")
    assert words in refused(capsys, "fit", "--config", "over.yaml")


def test_a_group_of_comments_changes_nothing(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("over.yaml").write_text("base: config.yaml\ntrainer:\n  # max_steps: 5\ndata:\n")
    assert made("--config", "over.yaml").trainer.max_steps == 1
    for name in ("trainer", "checkpoint"):
        Path("empty.yaml").write_text(f"{name}:\n")
        line = refused(capsys, "fit", "--config", str(file), "--config", "empty.yaml")
        assert "must have settings by name: got null. Leave it out to keep its values." in line


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_numpy_refuses_is_one_line(
    file: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"`seed_everything` must be from 0 to 4294967295: got {seed}. Choose a number in this"
    for command in ("fit", "evaluate"):
        flags = ["--models.a=b"] if command == "evaluate" else []
        line = refused(capsys, command, "--config", str(file), f"--seed_everything={seed}", *flags)
        assert line == f"{words} range."


def test_an_evaluation_reads_names_with_dots_and_refuses_unknown_ones(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install()
    text = CONFIG.replace(", logger: false", "")
    file.write_text(f"{text}trainer.logger: CSVLogger\nreport:\ncheckpoint: {{save_top_k: 1}}\n")
    assert make_parser().parse_args(pruned(["--config", str(file)])).trainer.logger is False
    file.write_text("seed_everything: null\n")
    assert pruned(["--config", str(file)]) == ["--config={}\n"]
    file.write_text(f"{CONFIG}dta: {{seed: 5}}\n")
    line = refused(capsys, "evaluate", "--config", str(file))
    assert line.endswith("must hold known settings: got `dta`. Did you mean data?")
    file.write_text(f"{CONFIG}qqq: 5\n")
    assert "got `qqq`. Remove it." in refused(capsys, "evaluate", "--config", str(file))
