"""Verifiable rewards: a function of one sampled completion."""

from kdrl_lightning.rewards.base import Reward, RewardRunner, Sample, Verdict
from kdrl_lightning.rewards.exact_match import ExactMatch

__all__ = ["ExactMatch", "Reward", "RewardRunner", "Sample", "Verdict"]
