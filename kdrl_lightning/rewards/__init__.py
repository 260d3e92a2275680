"""Verifiable rewards: a function of one sampled completion."""

from kdrl_lightning.rewards.base import Reward, RewardRunner, Sample, Verdict
from kdrl_lightning.rewards.exact_match import ExactMatch
from kdrl_lightning.rewards.overlong import OverlongPenalty

__all__ = ["ExactMatch", "OverlongPenalty", "Reward", "RewardRunner", "Sample", "Verdict"]
