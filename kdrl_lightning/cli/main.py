"""The command line for training: LightningCLI with ``KDRLModule`` and ``RolloutDataModule``."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import kdrl_lightning.callbacks
import kdrl_lightning.models.gguf
import kdrl_lightning.prompts
import kdrl_lightning.rewards  # noqa: F401
from kdrl_lightning.callbacks import (
    FSDPCheckpoint,
    PredictionWriter,
    RolloutProgress,
    RunReport,
    SamplePage,
    SelectiveImitationStats,
    StepProfile,
    WeightSyncCheck,
)
from kdrl_lightning.cli import layered_yaml
from kdrl_lightning.cli.help import OTHER_SUBCOMMANDS
from kdrl_lightning.cli.parser import OneLineParser
from kdrl_lightning.cli.settings.folders import removed_if_refused
from kdrl_lightning.cli.settings.trainer_values import check_trainer, with_values
from kdrl_lightning.cli.settings.unused import note_unused, take_notes
from kdrl_lightning.datamodule import RolloutDataModule
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.module import KDRLModule
from kdrl_lightning.trainer.checks.devices import check_devices
from kdrl_lightning.trainer.protocols import RolloutData, TrainedModule
from kdrl_lightning.trainer.run_folder import RunConfig, loggers_in_root
from kdrl_lightning.trainer.strategies import refuse_fsdp1

if TYPE_CHECKING:  # type checkers verify here that both classes fit the trainer's protocols

    def _as_trained(module: KDRLModule) -> TrainedModule:
        return module

    def _as_rollout_data(data: RolloutDataModule) -> RolloutData:
        return data


class KDRLCLI(LightningCLI):
    """Runs fit, validate, test and predict, configured by YAML and flags.

    Every run has a progress bar, and six callbacks with a group of settings each:
    ``imitation_stats``, ``weight_sync``, ``checkpoint``, ``predictions``, ``samples`` and
    ``report``. Add your own to ``trainer.callbacks``.
    """

    @classmethod
    def run(cls, args: Sequence[str] | None = None, instantiate_only: bool = False) -> KDRLCLI:
        """Parse and run a subcommand.

        Args:
            args: the words of the command line; None takes those of this process.
            instantiate_only: build trainer, model and data from ``args``, and run no subcommand.
        """
        quiet()
        layered_yaml.install()
        take_notes()  # clears the notes of an earlier command line
        given = sys.argv[1:] if args is None else list(args)
        return _only(cls, given[:1])(
            KDRLModule,
            RolloutDataModule,
            args=None if args is None else list(args),
            parser_class=OneLineParser,
            parser_kwargs={
                "prog": "python -m kdrl_lightning",
                "description": "Post-train a language model with rewards and a frozen teacher. "
                f"More subcommands: {', '.join(OTHER_SUBCOMMANDS)}.",
            },
            run=not instantiate_only,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=RunConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "default_root_dir": "runs",
                "inference_mode": False,
                "log_every_n_steps": 1,
                "num_sanity_val_steps": -1,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "logger": {
                    "class_path": "CSVLogger",
                    # Empty means `default_root_dir`, see `loggers_in_root`.
                    "init_args": {"save_dir": "", "name": "kdrl_lightning"},
                },
                "callbacks": RolloutProgress(),
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add a group of settings for each callback."""
        parser.add_lightning_class_args(SelectiveImitationStats, "imitation_stats")
        parser.add_lightning_class_args(WeightSyncCheck, "weight_sync")
        parser.add_lightning_class_args(FSDPCheckpoint, "checkpoint")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        parser.add_lightning_class_args(SamplePage, "samples")
        # Last, because it reads what the other callbacks have logged.
        parser.add_lightning_class_args(RunReport, "report")
        parser.add_argument(
            "--profile",
            action="store_true",
            help="Print where the time of the second rollout goes (StepProfile).",
        )

    def before_instantiate_classes(self) -> None:
        """Check groups, strategy, trainer and checkpoint before anything is built."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        refuse_empty_groups(config, self._parser(self.subcommand).get_defaults())
        refuse_fsdp1(config.trainer.strategy)  # before Lightning refuses it without a cure
        loggers_in_root(config.trainer)
        check_trainer(config.trainer)
        note_unused(config, self._parser(self.subcommand).get_default)
        path = config.get("ckpt_path")
        # Lightning's `best` means that of an earlier run in the same process: there is none.
        if path and path not in ("last", "hpc") and not Path(path).exists():
            raise ConfigurationError(
                f"`ckpt_path` must be a checkpoint: got {path}, which does not exist. Give a path, "
                "or `last`."
            )

    def _set_seed(self) -> None:
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        require_seed(config.seed_everything)
        super()._set_seed()

    def instantiate_classes(self) -> None:
        """Build everything; without ``data.seed``, data takes ``seed_everything``."""
        with seeded(self.config if self.subcommand is None else self.config[self.subcommand]):
            try:
                super().instantiate_classes()
            except TypeError as error:
                if "unexpected keyword argument" not in str(error):
                    raise
                raise ConfigurationError(
                    f"`dict_kwargs` must hold arguments that the class has: got {error}. Correct "
                    "the name, or write it below `init_args`."
                ) from error
        if self.trainer.is_global_zero:
            for note in take_notes():
                print(f"note: {note}", flush=True)

    # `Any`: Lightning's types.
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; if Lightning refuses a setting, raise ``ConfigurationError``."""
        given = self._get(self.config, "trainer")
        try:
            return super().instantiate_trainer(**kwargs)
        except ConfigurationError:
            raise
        except (
            ValueError,
            RuntimeError,
            TypeError,
            ImportError,
            MisconfigurationException,
        ) as error:
            raise ConfigurationError(with_values(str(error), vars(given))) from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        if config.get("enable_checkpointing") is False:
            callbacks = [c for c in callbacks if not isinstance(c, FSDPCheckpoint)]
        if self._get(self.config, "profile"):
            callbacks = [StepProfile(), *callbacks]
        check_devices(config.get("accelerator"), config.get("devices"))
        return super()._instantiate_trainer(config, callbacks)

    def _run_subcommand(self, subcommand: str) -> None:
        with removed_if_refused(self.trainer):
            super()._run_subcommand(subcommand)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "predict":  # PredictionWriter writes each batch at once
            kwargs["return_predictions"] = False
        return kwargs

    def _parse_ckpt_path(self) -> None:
        """Do nothing, so that hyper-parameters in a checkpoint do not override the command line."""


def _only(cls: type[KDRLCLI], asked: Sequence[str]) -> type[KDRLCLI]:
    """Return a command line that knows only the subcommand asked for, if it exists.

    Each subcommand has a parser of all settings, which takes a while to build.
    """
    known = {name: skip for name, skip in cls.subcommands().items() if name in asked}
    if not known:
        return cls
    return type(cls.__name__, (cls,), {"subcommands": staticmethod(lambda: known)})


@contextmanager
def seeded(config: Namespace) -> Iterator[None]:
    """Set ``data.seed`` to ``seed_everything`` inside the context, unless it is given.

    Afterwards it is None again, so a saved configuration follows the seed of its next run.
    """
    given = config.data.seed
    if given is None:
        config.data.seed = as_seed(config.seed_everything)
    try:
        yield
    finally:
        config.data.seed = given


def refuse_empty_groups(config: Namespace, defaults: Namespace, above: str = "") -> None:
    """Check that every group of settings is a mapping.

    Args:
        config: all settings, or those of a group.
        defaults: the defaults of these settings.
        above: name of that group, with a dot after it.

    Raises:
        ConfigurationError: a group is null or a single value.
    """
    for name, value in vars(config).items():
        default = defaults.get(name)
        if not isinstance(default, Namespace) or "class_path" in default:
            continue
        if not isinstance(value, Namespace):
            found = "null" if value is None else value
            raise ConfigurationError(
                f"`{above}{name}` must have settings by name: got {found}. Leave it out to keep "
                "its values."
            )
        refuse_empty_groups(value, default, f"{above}{name}.")


def require_seed(value: bool | int) -> None:
    """Check that a seed is in numpy's range.

    Raises:
        ConfigurationError: it is not.
    """
    if not 0 <= value < 2**32:
        raise ConfigurationError(
            f"`seed_everything` must be from 0 to {2**32 - 1}: got {value}. Choose a number in "
            "this range."
        )


def as_seed(value: bool | int | None) -> int:
    """Return the seed of rollouts from ``seed_everything``; true and false give 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def quiet() -> None:
    """Hide messages of other libraries that do not concern the run."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It logs the error that it raises; we print it as one line.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    # The student stays in evaluation mode, so that rollouts and updates use the same policy.
    warnings.filterwarnings("ignore", message="Found .* module.s. in eval mode")
    # Lightning 2.6 uses an old name of torch 2.13's tree specification.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    if not sys.stderr.isatty():
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
