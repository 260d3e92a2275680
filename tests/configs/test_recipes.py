"""The recipes are parsed as they are, and set up with small models and local data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import small_recipe
from benchmarks.small_recipe import FOLDER, main, make_stand_ins, shrunk
from kdrl_lightning import objectives
from kdrl_lightning.cli.layered_yaml import load_with_base
from kdrl_lightning.cli.main import KDRLCLI

# A random model stops late and is rarely right.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*of the (completions|groups):UserWarning",
    # All models here have one template; those with another end token are told so.
    "ignore:the chat template of .* closes a turn with:UserWarning",
)

BASES = {"base", "base.yaml", "teacher.yaml", "math.yaml", "zebra.yaml", "countdown.yaml"}
# One recipe of each kind; the others differ in names and numbers, which other tests compare.
KINDS = [
    *("kdrl", "kdrl_annealing", "smollm2_kdrl", "rlad_logic_0.6b_2k", "rlad_logic_1.7b_8k"),
    *("rlad_math_1.7b", "rlad_math_8b", "rlad_math_1.5b", "replication/grpo", "replication/kdrl"),
    *("replication/opd_then_rl", "replication/trrd", "opsd", "sdpo", "rlsd", "hdpo"),
    "cross_llama",
]
RECIPES = sorted(p for p in FOLDER.rglob("*.yaml") if not {p.parent.name, p.name} & BASES)


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Local folders and files by the names of the hub."""
    return make_stand_ins(tmp_path_factory.mktemp("recipes"))


def small(recipe: Path, names: dict[str, str], to: Path, *overlays: Path) -> str:
    """Write the recipe for one CPU process and a few short completions."""
    config = shrunk([recipe, *overlays], names, to, scale=10**6)
    config["data"]["rollout"]["group_size"] = 2
    config["trainer"]["limit_val_batches"] = 0
    file = to / "recipe.yaml"
    file.write_text(yaml.safe_dump(config))
    return str(file)


def name_of(recipe: Path) -> str:
    return str(recipe.relative_to(FOLDER).with_suffix(""))


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_a_recipe_parses_as_it_is(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        KDRLCLI.run(["fit", "--config", str(recipe), "--print_config"])
    assert ended.value.code == 0
    whole = yaml.safe_load(capsys.readouterr().out)
    gpu = not recipe.stem.startswith("smollm2_")
    assert (whole["trainer"]["devices"] == 8) == gpu
    assert ("VLLMEngine" in str(whole["data"]["rollout_engine"])) == gpu
    # The logger's name tells the runs of two recipes apart.
    assert whole["trainer"]["logger"]["init_args"]["name"].endswith(recipe.stem)


def built(value: Any) -> Any:
    """Build what a configuration says of an objective and its parts."""
    if isinstance(value, list):
        return [built(item) for item in value]
    if isinstance(value, dict) and "class_path" in value:
        arguments = {name: built(item) for name, item in value.get("init_args", {}).items()}
        return getattr(objectives, value["class_path"])(**arguments)
    return value


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_a_recipes_objective_can_be_built(recipe: Path) -> None:
    config = load_with_base(recipe.read_text(), str(recipe))
    objective = built(config["model"]["objective"])
    for callback in config["trainer"].get("callbacks", []):
        name = callback.get("init_args", {}).get("coefficient")
        assert name is None or objective.coefficient(name) >= 0.0


@pytest.fixture
def sets_up_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end before their first rollout: everything is loaded and checked."""
    monkeypatch.setattr("lightning.pytorch.Trainer._run_stage", lambda _: None)


@pytest.mark.usefixtures("sets_up_alone")
@pytest.mark.parametrize("name", KINDS)
def test_a_recipe_sets_up(name: str, stand_ins: dict[str, str], tmp_path: Path) -> None:
    file = small(FOLDER / f"{name}.yaml", stand_ins, tmp_path)
    cli = KDRLCLI.run(["fit", "--config", file])
    assert cli.model.student is not None and cli.trainer.global_step == 0
    assert type(cli.model.student.model).__name__.startswith(("Qwen2", "Qwen3", "Llama"))


@pytest.mark.parametrize("name", ["kdrl", "rlad_logic_0.6b_2k", "rlad_math_8b", "srpo"])
def test_a_recipe_takes_a_step(name: str, stand_ins: dict[str, str], tmp_path: Path) -> None:
    file = small(FOLDER / f"{name}.yaml", stand_ins, tmp_path)
    cli = KDRLCLI.run(["fit", "--config", file, "--trainer.max_steps=1"])
    assert (cli.trainer.global_step, cli.model.skipped_steps) == (1, 0)
    assert cli.model.teacher_seconds > 0.0


@pytest.mark.usefixtures("sets_up_alone")
@pytest.mark.parametrize(
    ("task", "prompts", "reward"),
    [
        ("math", "HFPrompts", "MathReward"),
        ("zebra", "ReasoningGymPrompts", "ReasoningGymReward"),
        ("countdown", "ReasoningGymPrompts", "ReasoningGymReward"),
    ],
)
def test_a_replication_takes_another_task(
    task: str, prompts: str, reward: str, stand_ins: dict[str, str], tmp_path: Path
) -> None:
    recipe, overlay = FOLDER / "replication/kdrl.yaml", FOLDER / f"replication/{task}.yaml"
    file = small(recipe, stand_ins, tmp_path, overlay)
    cli = KDRLCLI.run(["fit", "--config", file])
    assert type(cli.datamodule.train_prompts).__name__ == prompts
    assert type(cli.datamodule.rewards.reward).__name__ == reward
    assert cli.model.objective.coefficient("teacher_kl_coef") == 0.2


@pytest.mark.parametrize("name", ["rlad_math_1.7b"])
def test_the_command_runs_a_recipe_at_a_hundredth(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random weights get no answer right, so every group is flat and out of the loss."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["small_recipe.py", name, "--steps=4"])
    monkeypatch.setattr(small_recipe, "SCALE", 1000)
    main()
    out = capsys.readouterr().out
    assert "4 steps = 1 rollout" in out and "val" in out


# What is published: RLAD's values from the paper's text and tables, the replication's from its own.
LOGIC = {"clip_low": 0.2, "clip_high": 0.28, "rl_coef": (8 / 7) ** 0.5}
MATHS = {"clip_low": 0.2, "clip_high": 0.2, "rl_coef": (16 / 15) ** 0.5}
RLAD_PAPER = {
    "rlad_logic_0.6b_2k": ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B", 2048, LOGIC),
    "rlad_logic_0.6b_8k": ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B", 8192, LOGIC),
    "rlad_logic_1.7b_2k": ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B", 2048, LOGIC),
    "rlad_logic_1.7b_8k": ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B", 8192, LOGIC),
    "rlad_math_1.7b_base": ("Qwen/Qwen3-1.7B-Base", "Qwen/Qwen3-8B", 30720, MATHS),
    "rlad_math_8b": ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-32B", 30720, MATHS),
    "rlad_math_1.7b": ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B", 8192, MATHS),
    "rlad_math_1.5b": (
        *("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"),
        *(8192, MATHS),
    ),
}


NOT_THINKING = {"prefix": "<think>\n\n</think>\n\n"}


def read(teacher: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of the model that scores, and of its prompt."""
    given = teacher["init_args"]
    if teacher["class_path"] == "PromptedTeacher":
        return given["teacher"]["init_args"], given["prompt"]
    return given, {}


@pytest.mark.parametrize("name", RLAD_PAPER)
def test_rlads_recipes_are_the_papers(name: str) -> None:
    file = FOLDER / f"{name}.yaml"
    config = load_with_base(file.read_text(), str(file))
    model, rollout = config["model"], config["data"]["rollout"]
    student, teacher, tokens, objective = RLAD_PAPER[name]
    reader, prompt = read(model["teacher"])
    assert (model["student"], reader["model"]) == (student, teacher)
    assert (prompt == NOT_THINKING) == student.endswith("-Base")
    assert (rollout["max_tokens"], rollout["prompts_per_rollout"]) == (tokens, 256)
    assert model["optimizer"]["init_args"]["lr"] == 1e-6
    given = model["objective"]["init_args"]
    assert {name: given[name] for name in objective} == pytest.approx(objective)
    assert (given["trrd_alpha"], given["reduction"]) == (0.5, "sequence_mean")
    assert "offset_clamp" not in given and given["log_ratio_clamp"] == 1.0
    evaluation = config["data"]["evaluation"]
    assert (evaluation["temperature"], evaluation["top_p"]) == (0.6, 0.95)
    if "math" in name:
        assert (evaluation["samples"], evaluation["k"]) == (32, [32])
        assert config["data"]["max_prompt_tokens"] == 2048 and rollout["mask_flat_groups"]
        assert [c["class_path"] for c in config["trainer"]["callbacks"]] == ["AdaptiveEntropy"]
    else:
        assert rollout["group_size"] == 8
        sets = config["data"]["val_prompts"]
        assert sorted(sets) == [f"ppl{n}" for n in range(2, 9)]


REPLICATION = sorted(p.stem for p in (FOLDER / "replication").glob("*.yaml") if p.name not in BASES)


@pytest.mark.parametrize("name", REPLICATION)
def test_the_replications_recipes_are_its_own(name: str) -> None:
    file = FOLDER / f"replication/{name}.yaml"
    config = load_with_base(file.read_text(), str(file))
    rollout, ask = config["data"]["rollout"], config["data"]["train_prompts"]["init_args"]
    assert (rollout["prompts_per_rollout"], rollout["group_size"]) == (128, 8)
    assert rollout["minibatches_per_rollout"] * 16 == 128
    assert config["trainer"]["max_steps"] == 150 * rollout["minibatches_per_rollout"]
    assert (rollout["max_tokens"], rollout["temperature"]) == (4096, 1.0)
    assert (ask["people"], ask["size"], ask["seed"]) == (6, 20000, 1)
    sampled = config["data"]["evaluation"]
    assert sampled == {
        **{"batch_size": 64, "samples": 32, "k": [32]},
        **{"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    }
    held_out = config["data"]["val_prompts"]["init_args"]
    assert (held_out["size"], held_out["seed"]) == (512, 42)
    objective = config["model"]["objective"]
    assert objective["init_args"]["reduction"] == "sequence_mean"
    if name != "grpo":
        selections = [s["class_path"] for s in objective["init_args"]["selection"]]
        assert selections[-1] == "ExceptEndToken"
        assert read(config["model"]["teacher"]) == ({"model": "Qwen/Qwen3-8B"}, NOT_THINKING)


def test_the_system_prompt_of_the_replication_is_reasoning_gyms() -> None:
    prompts = pytest.importorskip("reasoning_gym.utils").SYSTEM_PROMPTS
    for name in ("base", "zebra", "countdown"):
        config = yaml.safe_load((FOLDER / f"replication/{name}.yaml").read_text())
        assert config["data"]["train_prompts"]["init_args"]["system"] == prompts["default"]


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_every_value_of_a_recipe_says_where_it_is_from(recipe: Path) -> None:
    text = recipe.read_text()
    assert "[" in text or "our choice" in text
    for key in ("trrd_alpha:", "teacher_kl_coef:", "clip_low:", "student:", "max_tokens:"):
        for line in text.splitlines():
            if line.strip().startswith(key) and "smollm2" not in recipe.stem:
                assert any(tag in line for tag in ("[P]", "[P2]", "[R]", "[O]")), line


# From the papers of the methods for a self-teacher: prompts, group, rate, tokens, objective.
SELF_TEACHERS = {
    "opsd": (32, 1, 5e-6, "InitialWeights", "ColumnContext", {"reduction": "sequence_mean"}),
    "sdpo": (32, 8, 1e-5, "MovingAverage", "SiblingContext", {"jsd_beta": 0.5, "top_k": 100}),
    "srpo": (32, 8, 5e-6, "MovingAverage", "SiblingContext", {"clip_high": 0.28, "sharpness": 1.0}),
    "hdpo": (32, 16, 1e-6, None, "ColumnContext", {"teacher_kl_coef": 0.1, "top_k": 64}),
    "rlsd": (256, 8, 1e-6, "HardSync", "ColumnContext", {"mix": 0.5, "width": 0.2}),
}


@pytest.mark.parametrize("name", SELF_TEACHERS)
def test_recipes_of_self_teachers_are_the_papers(name: str) -> None:
    file = FOLDER / f"{name}.yaml"
    config = load_with_base(file.read_text(), str(file))
    model, rollout = config["model"], config["data"]["rollout"]
    prompts, group, rate, weights, context, objective = SELF_TEACHERS[name]
    assert (rollout["prompts_per_rollout"], rollout["group_size"]) == (prompts, group)
    assert model["optimizer"]["init_args"]["lr"] == rate
    teacher = model["teacher"]["init_args"]
    assert teacher["teacher"]["init_args"].get("weights", {}).get("class_path") == weights
    assert teacher["prompt"]["context"]["class_path"] == context
    assert objective.items() <= model["objective"]["init_args"].items()
