"""Verifiable rewards: a function of one sampled completion."""

from kdrl_lightning.rewards.base import BatchReward, Reward, Sample, TaskReward, Verdict
from kdrl_lightning.rewards.composed import RoutedReward, WeightedRewards
from kdrl_lightning.rewards.exact_match import ExactMatch
from kdrl_lightning.rewards.length import LengthPenalty
from kdrl_lightning.rewards.runner import RewardRunner

__all__ = [
    "BatchReward",
    "ExactMatch",
    "LengthPenalty",
    "Reward",
    "RewardRunner",
    "RoutedReward",
    "Sample",
    "TaskReward",
    "Verdict",
    "WeightedRewards",
]
