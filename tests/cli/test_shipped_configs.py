"""Configurations by name, the subcommand that lists and copies them, and the screens of help."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.program import refused
from kdrl_lightning.__main__ import main
from kdrl_lightning.cli.configs import bases_of, copy, describe, listing, load
from kdrl_lightning.cli.evaluate import make_parser
from kdrl_lightning.cli.help import ALL, FLAGS, RUNS, SUBCOMMANDS, first_screen, screen
from kdrl_lightning.cli.layered_yaml import load_with_base
from kdrl_lightning.cli.main import KDRLCLI
from kdrl_lightning.cli.settings.unused import take_notes
from kdrl_lightning.cli.shipped import FOLDER, config_file, find, names, with_files
from kdrl_lightning.errors import ConfigurationError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    take_notes()
    return tmp_path


def test_the_package_reaches_the_folder_of_the_repository() -> None:
    assert FOLDER.resolve() == ROOT / "configs"
    assert len(names()) == len(list((ROOT / "configs").rglob("*.yaml")))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("rlad", "rlad.yaml"),
        ("rlad.yaml", "rlad.yaml"),
        ("configs/rlad.yaml", "rlad.yaml"),
        ("engine/vllm", "engine/vllm.yaml"),
        ("recipes/rlad_math_1.7b", "recipes/rlad_math_1.7b.yaml"),
    ],
)
def test_a_name_finds_the_shipped_file(name: str, file: str, here: Path) -> None:
    assert config_file(name) == FOLDER / file
    assert take_notes() == []


@pytest.mark.parametrize("name", ["", "engine", "../pyproject.toml", "/etc/hostname", "rlda"])
def test_no_other_file_is_found(name: str) -> None:
    assert find(name) is None


def test_a_file_of_the_user_wins_and_a_hidden_name_is_noted(here: Path) -> None:
    Path("rlad.yaml").write_text("data: {group_size: 4}\n")
    assert config_file("rlad.yaml") == Path("rlad.yaml")
    assert take_notes() == []
    assert config_file("rlad") == Path("rlad.yaml")
    (line,) = take_notes()
    assert line == ("`--config rlad` is your file rlad.yaml, not the configuration of the library.")
    Path("rlad.yaml").write_bytes((FOLDER / "rlad.yaml").read_bytes())
    assert config_file("rlad") == Path("rlad.yaml")
    assert take_notes() == []


def test_a_folder_of_the_user_wins_too(here: Path) -> None:
    Path("rlad").mkdir()
    Path("mine").mkdir()
    with pytest.raises(ConfigurationError, match=r"got rlad, a folder\. Write rlad\.yaml for"):
        config_file("rlad")
    with pytest.raises(ConfigurationError, match=r"got mine, a folder\. Name a file in it\.$"):
        config_file("mine")
    assert config_file("rlad.yaml") == FOLDER / "rlad.yaml"


def test_only_names_after_config_are_replaced(here: Path) -> None:
    words = ["fit", "--config", "rlad", "--config=engine/vllm", "--model.student", "rlad"]
    words += ["-c", "kdrl", "--config={data: {group_size: 4}}"]
    assert with_files(words) == [
        *("fit", "--config", f"{FOLDER}/rlad.yaml", f"--config={FOLDER}/engine/vllm.yaml"),
        *("--model.student", "rlad", "-c", f"{FOLDER}/kdrl.yaml"),
        "--config={data: {group_size: 4}}",
    ]


@pytest.mark.parametrize("words", [["--config="], ["--config", " "]], ids=str)
def test_an_empty_name_is_refused(
    words: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may be a shell's variable that is not set: the run would take defaults alone."""
    line = refused(capsys, "fit", "--config", "grpo", *words)
    assert "`--config` must name a configuration: got '" in line


@pytest.mark.parametrize("subcommand", ["fit", "predict", "evaluate"])
def test_a_misspelt_name_is_one_line_with_its_cure(
    subcommand: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, subcommand, "--config", "grpoo")
    assert "got grpoo. Did you mean grpo or srpo?" in line
    assert "`python -m kdrl_lightning configs` lists" in line
    assert "Did you mean engine/vllm or hardware/gpu1_vllm?" in refused(
        capsys, subcommand, "--config", "vllm"
    )


def test_names_work_in_the_parsers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = KDRLCLI.run(["--config", "rlad", "--config=hardware/nodes"], instantiate_only=True)
    init_args = cli.config.model.objective.init_args
    assert (init_args.trrd_alpha, init_args.clip_high) == (0.5, 0.28)  # of rlad.yaml alone
    assert cli.config.trainer.num_nodes == 2
    with pytest.raises(SystemExit):
        main(["evaluate", "--config", "rlad", "--print_config"])
    assert "addition_reward" in capsys.readouterr().out


def test_a_base_may_be_a_name(here: Path) -> None:
    found = load_with_base("base: rlad\ndata: {rollout: {group_size: 4}}\n", "mine.yaml")
    assert found["data"]["rollout"]["group_size"] == 4
    assert found["model"]["objective"]["class_path"] == "RLAD"


@pytest.mark.parametrize("width", [80, 100])
def test_the_list_has_every_name_and_fits(width: int) -> None:
    text = listing(width)
    assert max(map(len, text.splitlines())) <= width
    listed = set(re.findall(r"^  ([\w./]+)  ", text, re.M))
    assert listed == {name for name in names() if "base" not in name.split("/")}


def test_needs_are_those_of_the_settings() -> None:
    assert "Needs" not in describe("rlad")
    assert describe("engine/server_teacher").endswith("Needs a vLLM server.")
    assert describe("hardware/gpu1").endswith("Needs a GPU.")
    assert describe("hardware/node8_vllm").endswith("Needs 8 GPUs, vLLM.")
    assert describe("recipes/rlad_math_1.7b").endswith(
        "Needs 8 GPUs, the model hub, vLLM, the extra `tasks`."
    )


@pytest.mark.parametrize("name", names())
def test_a_copy_runs_by_itself(name: str, here: Path) -> None:
    written = copy(name, Path("deep/mine.yaml"))
    assert load_with_base(written[0].read_text(), str(written[0])) == load(name)
    folder = here / "deep"
    assert all(folder in base.resolve().parents for base in bases_of(written[0]))
    assert len(bases_of(written[0])) == len(written) - 1
    original = (FOLDER / f"{name}.yaml").read_text()
    assert re.sub(r"^base: \S+", "", written[0].read_text(), flags=re.M) == re.sub(
        r"^base: \S+", "", original, flags=re.M
    )


def test_a_copy_overwrites_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs", "copy", "rlad"])
    assert "fit --config rlad.yaml" in capsys.readouterr().out
    for name, there in (("rlad.yaml", "rlad.yaml"), ("rlad.yml", "rlad_bases")):
        line = refused(capsys, "configs", "copy", "rlad", "--output", name)
        assert f"`--output` must name a new file: got {there}, which exists." in line


def test_show_prints_a_file_or_all_that_it_sets(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["configs", "show", "rlad"])
    assert capsys.readouterr().out == (FOLDER / "rlad.yaml").read_text()
    main(["configs", "show", "rlad", "--resolved"])
    text = capsys.readouterr().out
    assert "base:" not in text and load_with_base(text, "x.yaml") == load("rlad")
    assert "got rlda. Did you mean" in refused(capsys, "configs", "show", "rlda")


def test_the_first_screen_fits_and_names_every_subcommand() -> None:
    lines = first_screen().splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert set(KDRLCLI.subcommands()) == set(RUNS)
    assert [line.split()[0] for line in lines[4 : 4 + len(SUBCOMMANDS)]] == list(SUBCOMMANDS)


@pytest.mark.parametrize("subcommand", ALL)
def test_a_subcommands_screen_fits(subcommand: str) -> None:
    lines = screen(subcommand).splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 100
    assert any("--help_all" in line for line in lines)


def test_the_screens_name_flags_that_exist() -> None:
    shown = [(flag.split()[0], where) for rows in FLAGS.values() for flag, _, where in rows if flag]
    cli = KDRLCLI.run(["--config", str(FOLDER / "rlad.yaml")], instantiate_only=True)
    # Without a subcommand the parser has all of `fit` but its checkpoint.
    known = {s for action in cli.parser._actions for s in action.option_strings} | {"--ckpt_path"}
    of_evaluate = {s for action in make_parser()._actions for s in action.option_strings}
    for flag, where in shown:
        assert flag in known or "fit" not in where, flag
        assert flag.replace(".NAME", "") in of_evaluate or "evaluate" not in where, flag


def test_help_and_the_list_import_no_torch(here: Path) -> None:
    code = "import sys; from kdrl_lightning.__main__ import main; main(sys.argv[1:]); "
    code += "sys.exit('torch' in sys.modules)"
    for words in (["--help"], ["fit", "--help"], ["configs"], ["configs", "show", "rlad"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stderr)


@pytest.mark.parametrize("args", [[], ["fti"], ["zzz"]], ids=str)
def test_a_missing_or_unknown_subcommand(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, *args)
    assert ("Did you mean fit?" if args == ["fti"] else "Choose one of fit, validate,") in line
