"""The data modules: rollouts for reinforcement learning, and completions for fine-tuning."""

from kdrl_lightning.datamodule.rollouts import RolloutDataModule
from kdrl_lightning.datamodule.supervised import SupervisedDataModule

__all__ = ["RolloutDataModule", "SupervisedDataModule"]
