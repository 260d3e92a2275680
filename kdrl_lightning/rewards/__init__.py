"""Verifiable rewards: functions that judge one sampled completion."""

from kdrl_lightning.rewards.answers.feedback import AnswerFeedback
from kdrl_lightning.rewards.base import BatchReward, Reward, Sample, TaskReward, Verdict
from kdrl_lightning.rewards.code import CodeReward
from kdrl_lightning.rewards.composed import RoutedReward, WeightedRewards
from kdrl_lightning.rewards.exact_match import ExactMatch
from kdrl_lightning.rewards.format import FormatReward
from kdrl_lightning.rewards.function import RewardFunction
from kdrl_lightning.rewards.knights import KnightsAndKnavesReward
from kdrl_lightning.rewards.length import LengthPenalty
from kdrl_lightning.rewards.math import MathReward
from kdrl_lightning.rewards.processes.runner import RewardFailures, RewardRunner
from kdrl_lightning.rewards.reasoning_gym import ReasoningGymReward

__all__ = [
    "AnswerFeedback",
    "BatchReward",
    "CodeReward",
    "ExactMatch",
    "FormatReward",
    "KnightsAndKnavesReward",
    "LengthPenalty",
    "MathReward",
    "ReasoningGymReward",
    "Reward",
    "RewardFailures",
    "RewardFunction",
    "RewardRunner",
    "RoutedReward",
    "Sample",
    "TaskReward",
    "Verdict",
    "WeightedRewards",
]
