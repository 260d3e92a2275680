"""Runs ``python -m kdrl_lightning evaluate``: compares models on the same prompts, in one table."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import torch
from filelock import FileLock
from jsonargparse import Namespace
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_only

import kdrl_lightning.callbacks
import kdrl_lightning.prompts
import kdrl_lightning.rewards  # noqa: F401
from kdrl_lightning.checkpoints.layout import META
from kdrl_lightning.cli import layered_yaml
from kdrl_lightning.cli.export import export
from kdrl_lightning.cli.layered_yaml import load_with_base, nested
from kdrl_lightning.cli.main import as_seed, quiet, refuse_empty_groups, require_seed, seeded
from kdrl_lightning.cli.parser import OneLineParser
from kdrl_lightning.cli.settings.text import dump
from kdrl_lightning.cli.settings.unused import take_notes
from kdrl_lightning.cli.shipped import config_file
from kdrl_lightning.datamodule import RolloutDataModule
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.evaluation.table import by_set, markdown_table
from kdrl_lightning.models.loading import ModelSource
from kdrl_lightning.module import KDRLModule
from kdrl_lightning.objectives import SFT
from kdrl_lightning.trainer.checks.devices import check_devices

# Settings of a training configuration that we switch off; a flag can switch them on.
SWITCHED_OFF = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
# Groups of a configuration that an evaluation reads; the others concern training.
GROUPS = ("models", "output", "seed_everything", "data", "trainer")
FOR_TRAINING = (
    *("model", "imitation_stats", "weight_sync", "checkpoint", "predictions", "samples", "report"),
    *("profile", "ckpt_path", "weights_only", "verbose", "return_predictions"),
)


class CheckpointStudent(ModelSource):
    """Provides the student of a checkpoint, and exports it at the first request.

    Args:
        ckpt_path: a checkpoint of ``fit``: a file, or a folder of shards.
        output: folder in which to put the exported model.
    """

    def __init__(self, ckpt_path: str, output: str) -> None:
        self.ckpt_path = ckpt_path
        stamp = f"{Path(ckpt_path).resolve()} {Path(ckpt_path).stat().st_mtime_ns}"
        digest = hashlib.sha256(stamp.encode()).hexdigest()[:12]
        self.folder = Path(output) / f"exported-{digest}"

    def path(self) -> str:
        """Return the folder of the exported student; the first call exports it."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.folder}.lock"):
            if not self.folder.exists():
                half = self.folder.with_suffix(".part")
                shutil.rmtree(half, ignore_errors=True)
                export(self.ckpt_path, str(half))
                half.rename(self.folder)
        return str(self.folder)

    def remove(self) -> None:
        """Delete the exported model."""
        shutil.rmtree(self.folder, ignore_errors=True)
        Path(f"{self.folder}.lock").unlink(missing_ok=True)


def evaluate(args: Sequence[str]) -> None:
    """Sample every model on the test sets; write ``evaluation.json`` and ``evaluation.md``.

    Args:
        args: the command line after ``evaluate``.

    Raises:
        ConfigurationError: no model is named, or a setting is wrong.
    """
    quiet()
    layered_yaml.install()
    take_notes()  # clears the notes of an earlier command line
    parser = make_parser()
    config = parser.parse_args(pruned(args))
    refuse_empty_groups(config, parser.get_defaults())
    require_seed(config.seed_everything)
    for note in take_notes():
        first_rank_prints(f"note: {note}")
    if not config.models:
        raise ConfigurationError(
            "`models` must name at least one model: got none. Give `--models.NAME PATH`."
        )
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name in config.models:
        results[name], data, trainer = evaluate_one(parser, config, name)
    if not trainer.is_global_zero:
        return
    sets = data.evaluation.test
    table = markdown_table(results, sets)
    folder = Path(config.output)
    named = config.models.items()
    report = {
        "models": {n: m if isinstance(m, str) else m.as_dict() for n, m in named},
        "sets": {
            one.name: {
                "prompts": len(one.prompts),
                "samples": one.samples,
                "temperature": one.sampling.temperature,
                "top_p": one.sampling.top_p,
                "top_k": one.sampling.top_k,
                "min_p": one.sampling.min_p,
                "max_tokens": one.sampling.max_tokens,
                "k": one.ks,
            }
            for one in sets
        },
        "results": results,
        "seed": data.seed,
        "torch": torch.__version__,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "evaluation.md").write_text(table + "\n")
    print(f"\n{table}\n\nwritten to {folder}/evaluation.json and evaluation.md")


@rank_zero_only
def first_rank_prints(line: str) -> None:
    """Print a line on the first rank only."""
    print(line, flush=True)


def evaluate_one(
    parser: OneLineParser, config: Namespace, name: str
) -> tuple[dict[str, dict[str, float]], RolloutDataModule, Trainer]:
    """Sample one model; return its metrics by test set, the data module and the trainer."""
    with seeded(config):
        made = parser.instantiate_classes(config)
    seed_everything(as_seed(config.seed_everything), verbose=False)
    check_devices(made.trainer.get("accelerator"), made.trainer.get("devices"))
    try:
        trainer = Trainer(**made.trainer)
    except (ValueError, RuntimeError, TypeError, ImportError) as error:  # as in training
        raise ConfigurationError(str(error)) from error
    source = made.models[name]
    if isinstance(source, str) and is_checkpoint(source):
        source = CheckpointStudent(source, config.output)
    # An evaluation uses no objective, but the module needs one; SFT needs no teacher.
    module = KDRLModule(source, SFT())
    if trainer.is_global_zero:
        print(f"measuring {name}", flush=True)
    trainer.test(module, datamodule=made.data, verbose=False)
    made.data.rollout_engine.close()  # before the next model's engine takes the memory
    values = {key: float(value) for key, value in trainer.callback_metrics.items()}
    if isinstance(source, CheckpointStudent) and trainer.is_global_zero:
        source.remove()
    return by_set(values, made.data.evaluation.test), made.data, trainer


def make_parser() -> OneLineParser:
    """Return the parser of the subcommand."""
    parser = OneLineParser(
        prog="python -m kdrl_lightning evaluate",
        description="Compare models and checkpoints on the prompts of `data.test_prompts` (or "
        "`data.val_prompts`), without training. From a configuration of `fit` it reads `data` and "
        "`trainer`.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action="config", help="a configuration; one of `fit` works, too."
    )
    parser.add_argument(
        "--models",
        type=dict[str, str | ModelSource],
        default={},
        help="models by name: Hugging Face folder, hub name, checkpoint, or model source.",
    )
    parser.add_argument("--output", type=str, default="evaluation", help="folder of the table.")
    parser.add_argument(
        "--seed_everything", type=bool | int, default=0, help="seed of sampling; true and false: 0."
    )
    parser.add_lightning_class_args(RolloutDataModule, "data")
    parser.add_lightning_class_args(Trainer, "trainer")
    off = {f"trainer.{name}": False for name in SWITCHED_OFF}
    parser.set_defaults({"data.train_prompts": [], "trainer.inference_mode": False, **off})
    return parser


def pruned(args: Sequence[str]) -> list[str]:
    """Replace each ``--config FILE`` by the settings of the file that an evaluation needs."""
    out, rest = [], list(args)
    while rest:
        word = rest.pop(0)
        if word == "--config" and rest:
            out.append(f"--config={_needed(rest.pop(0))}")
        elif word.startswith("--config="):
            out.append(f"--config={_needed(word.removeprefix('--config='))}")
        else:
            out.append(word)
    return out


def _needed(name: str) -> str:
    path = config_file(name)
    try:
        config = load_with_base(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"`config` must be UTF-8: got {name} ({error}). Save it as UTF-8."
        ) from error
    if not isinstance(config, dict):
        raise ConfigurationError(
            f"`config` must contain settings by name: got {name}, which is not a mapping. Write "
            "`name: value`."
        )
    config = nested(config)
    for key in config:
        if key not in GROUPS + FOR_TRAINING:
            close = get_close_matches(str(key), GROUPS + FOR_TRAINING, n=1)
            cure = f"Did you mean {close[0]}?" if close else "Remove it."
            raise ConfigurationError(f"{name} must hold known settings: got `{key}`. {cure}")
    kept = {k: v for k, v in config.items() if k in GROUPS and v is not None}
    for group, names in (("data", ("train_prompts",)), ("trainer", SWITCHED_OFF)):
        if isinstance(kept.get(group), dict):
            kept[group] = {k: v for k, v in kept[group].items() if k not in names}
    return dump(kept)


def is_checkpoint(path: str) -> bool:
    """Return whether a path is a checkpoint of ``fit`` rather than a model folder."""
    return Path(path).is_file() or (Path(path) / META).is_file()
