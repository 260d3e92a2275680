"""A setting that a later file or a class would drop is used, refused or named."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.program import CONFIG, made, refused


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainer: {logger: {CSVLogger: {}}}", "`trainer.logger`: Option 'CSVLogger' is not acc"),
        ("trainer: {logger: {a: {b: {}}}}", "`trainer.logger`: Option 'a.b' is not accepted"),
        ("data: {rollout: {group: {}}}", "Option 'data.rollout.group' is not accepted"),
        ("data: {evaluation: {x: {y: {}}}}", "Option 'data.evaluation.x.y' is not accepted"),
        ("model: {optimizer: {AdamW: {}}}", "`model.optimizer`: Option 'AdamW' is not accepted"),
        ("model: {lora: {alphas: {}}}", "`model.lora`: Option 'alphas' is not accepted"),
        ("nothing: {}", "Option 'nothing' is not accepted"),
        ("trainer: {callbacks: {}}", "`trainer.callbacks` must name a class of type Callb"),
        ("trainer: {callbacks: {CPUThreads: {}}}", "`trainer.callbacks` must name a class of type"),
        ("trainer: {plugins: {X: {}}}", "`trainer.plugins` must name a class of type Precis"),
        ("model: {lr_scheduler: {X: {}}}", "`model.lr_scheduler` must name a function, or a cla"),
    ],
)
def test_an_empty_group_of_an_unknown_name_is_refused(
    file: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("over.yaml").write_text(f"base: config.yaml\n{text}\n")
    assert words in refused(capsys, "fit", "--config", "over.yaml")


def test_an_empty_group_of_a_known_name_changes_nothing(file: Path) -> None:
    text = (
        "data: {rollout: {}, evaluation: {}}\nmodel: {objective: {class_path: GRPO, init_args: }}"
    )
    cli = made("--config", "config.yaml", f"--config={text}")
    assert cli.datamodule.rollout.group_size == 8
    Path("empty.yaml").write_text("# trainer: {max_steps: 5}\n")
    assert made("--config", "config.yaml", "--config", "empty.yaml").trainer.max_steps == 1
    cli = made("--config", "config.yaml", "--config=model: {lora: {}}")
    assert cli.config.model.lora.init_args.rank == 16


@pytest.mark.parametrize(
    ("old", "words"),
    [
        ("5", "`model.objective`: Not a valid subclass of Objective. Got value: 5"),
        ("{clip_low: 0.1}", "`model.objective` replaces the settings of its base, so `clip_low` h"),
        ("{class_path: NoSuch}", "`model.objective` must be a Objective, by name or import path"),
        ("{class_path: KDRL, init_args: {clip_lo: 1}}", "`model.objective`: Option 'clip_lo' is n"),
    ],
)
def test_a_wrong_value_of_a_base_is_named_though_it_is_replaced(
    file: Path, old: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(CONFIG.replace("{class_path: GRPO}", old))
    Path("over.yaml").write_text("base: config.yaml\nmodel: {objective: {class_path: GRPO}}\n")
    made("--config", "over.yaml")
    notes = capsys.readouterr().out
    assert f"note: {words}" in notes
    assert "clip_low" in old or "This is in config.yaml, and a later file replaces it." in notes


def test_values_of_a_base_that_are_right_or_unfinished_are_no_matter(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = "{class_path: LocalTeacher}"  # its model comes later
    file.write_text(CONFIG.replace("GRPO}", f"GRPO}}, teacher: {teacher}, lora: {{rank: 4}}"))
    over = "trainer: {max_steps: 2, logger: CSVLogger}\nmodel: {teacher: null, lora: {rank: 8}}"
    Path("over.yaml").write_text(f"base: config.yaml\n{over}\n")
    assert made("--config", "over.yaml").config.model.lora.init_args.rank == 8
    assert capsys.readouterr().out == ""


def test_arguments_of_a_base_without_a_class_are_for_the_class_that_comes(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(CONFIG.replace("{class_path: GRPO}", "{init_args: {clip_low: 0.1}}"))
    Path("over.yaml").write_text("base: config.yaml\nmodel: {objective: {class_path: GRPO}}\n")
    assert made("--config", "over.yaml").config.model.objective.init_args.clip_low == 0.1
    assert capsys.readouterr().out == ""


def test_a_flag_before_the_file_that_sets_it_is_named(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--trainer.max_steps=9", "--data.seed", "4"]
    for given in (["--config", "config.yaml"], ["--config=config.yaml"]):
        cli = made(*flags, *given)
        assert cli.trainer.max_steps == 1 and cli.datamodule.seed == 4
        assert capsys.readouterr().out == (
            "note: `--trainer.max_steps` has no effect: --config config.yaml follows it and sets "
            "it. Put it last.\n"
        )
    assert made("--config", "config.yaml", *flags).trainer.max_steps == 9
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("trainer: {precision: '0x10'}", "`trainer.precision` must be one of 64, 32, 16, "),
        ("trainer: {precision: '1_6'}", ": got 1_6."),
        ("seed_everything: 1.0", "`seed_everything` must be a whole number: got 1.0."),
        (
            "model: {optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1-e6}}}",
            "`model.optimizer.lr` must be a number: got 1-e6.",
        ),
        (
            "model: {objective: {class_path: GRPO, dict_kwargs: {clip_lo: 1}}}",
            "`dict_kwargs` must hold arguments that the class has: got PolicyObjective.__init__()",
        ),
    ],
)
def test_what_is_not_meant_by_a_text_is_not_read_into_it(
    file: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, "fit", "--config", "config.yaml", f"--config={text}")
