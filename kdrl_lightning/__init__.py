"""PyTorch-Lightning components for joint reinforcement learning and distillation (KDRL, RLAD).

Names are loaded on first use: importing the package imports neither Lightning, nor transformers,
nor vLLM.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kdrl_lightning.common import old_names

__version__ = "0.1.0"

_HOME = {
    "KDRLModule": "module",
    "EvaluationSettings": "evaluation",
    "RewardFailures": "rewards",
    "RolloutDataModule": "datamodule",
    "RolloutSettings": "rollout.settings",
    "TeacherCompletions": "rollout.settings",
    "SupervisedDataModule": "datamodule",
    "EvalSet": "evaluation",
    "RolloutBatch": "rollout_batch",
    "GRPO": "objectives",
    "KDRL": "objectives",
    "RLAD": "objectives",
    "ClippedDistillation": "objectives",
    "OnPolicyDistillation": "objectives",
    "SFT": "objectives",
    "CISPO": "objectives",
    "GKD": "objectives",
    "GSPO": "objectives",
    "RLSD": "objectives",
    "SRPO": "objectives",
    "EOPD": "objectives",
    "GOPD": "objectives",
    "OPSD": "objectives",
    "PublishedHDPO": "objectives",
    "PublishedSRPO": "objectives",
    "SCOPE": "objectives",
    "SDAR": "objectives",
    "SDFT": "objectives",
    "SDPO": "objectives",
    "PolicyObjective": "objectives",
    "Objective": "objectives",
    "GGUFModel": "models.gguf",
    "LoRA": "models.lora",
    "AdapterOffTeacher": "teachers",
    "LocalTeacher": "teachers",
    "CachedTeacher": "teachers",
    "CrossTokenizerTeacher": "teachers",
    "PromptedTeacher": "teachers",
    "RoutedTeacher": "teachers",
    "SelfTeacher": "teachers",
    "ServerTeacher": "teachers",
    "Teacher": "teachers",
    "TeacherPrompt": "teachers",
    "ColumnContext": "teachers",
    "FeedbackContext": "teachers",
    "FixedContext": "teachers",
    "JoinedContext": "teachers",
    "OtherProblemContext": "teachers",
    "SiblingContext": "teachers",
    "TransformersEngine": "engines",
    "VLLMEngine": "engines",
    "VLLMServerEngine": "engines",
    "VLLMTeacherEngine": "engines",
    "RolloutEngine": "engines",
    "HFPrompts": "prompts",
    "JSONLPrompts": "prompts",
    "KnightsAndKnavesPrompts": "prompts",
    "MixedPrompts": "prompts",
    "ParsedPrompts": "prompts",
    "ReasoningGymPrompts": "prompts",
    "StreamedHFPrompts": "prompts",
    "AnswerFeedback": "rewards",
    "BatchReward": "rewards",
    "CodeReward": "rewards",
    "ExactMatch": "rewards",
    "FormatReward": "rewards",
    "KnightsAndKnavesReward": "rewards",
    "LengthPenalty": "rewards",
    "MathReward": "rewards",
    "ReasoningGymReward": "rewards",
    "RewardFunction": "rewards",
    "RoutedReward": "rewards",
    "Sample": "rewards",
    "TaskReward": "rewards",
    "Verdict": "rewards",
    "WeightedRewards": "rewards",
    "ConfigurationError": "errors",
    "TrainingStopped": "errors",
}

old_names.install()

__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from kdrl_lightning.datamodule import RolloutDataModule as RolloutDataModule
    from kdrl_lightning.datamodule import SupervisedDataModule as SupervisedDataModule
    from kdrl_lightning.engines import RolloutEngine as RolloutEngine
    from kdrl_lightning.engines import TransformersEngine as TransformersEngine
    from kdrl_lightning.engines import VLLMEngine as VLLMEngine
    from kdrl_lightning.engines import VLLMServerEngine as VLLMServerEngine
    from kdrl_lightning.engines import VLLMTeacherEngine as VLLMTeacherEngine
    from kdrl_lightning.errors import ConfigurationError as ConfigurationError
    from kdrl_lightning.errors import TrainingStopped as TrainingStopped
    from kdrl_lightning.evaluation import EvalSet as EvalSet
    from kdrl_lightning.evaluation import EvaluationSettings as EvaluationSettings
    from kdrl_lightning.models.gguf import GGUFModel as GGUFModel
    from kdrl_lightning.models.lora import LoRA as LoRA
    from kdrl_lightning.module import KDRLModule as KDRLModule
    from kdrl_lightning.objectives import CISPO as CISPO
    from kdrl_lightning.objectives import EOPD as EOPD
    from kdrl_lightning.objectives import GKD as GKD
    from kdrl_lightning.objectives import GOPD as GOPD
    from kdrl_lightning.objectives import GRPO as GRPO
    from kdrl_lightning.objectives import GSPO as GSPO
    from kdrl_lightning.objectives import KDRL as KDRL
    from kdrl_lightning.objectives import OPSD as OPSD
    from kdrl_lightning.objectives import RLAD as RLAD
    from kdrl_lightning.objectives import RLSD as RLSD
    from kdrl_lightning.objectives import SCOPE as SCOPE
    from kdrl_lightning.objectives import SDAR as SDAR
    from kdrl_lightning.objectives import SDFT as SDFT
    from kdrl_lightning.objectives import SDPO as SDPO
    from kdrl_lightning.objectives import SFT as SFT
    from kdrl_lightning.objectives import SRPO as SRPO
    from kdrl_lightning.objectives import ClippedDistillation as ClippedDistillation
    from kdrl_lightning.objectives import Objective as Objective
    from kdrl_lightning.objectives import OnPolicyDistillation as OnPolicyDistillation
    from kdrl_lightning.objectives import PolicyObjective as PolicyObjective
    from kdrl_lightning.objectives import PublishedHDPO as PublishedHDPO
    from kdrl_lightning.objectives import PublishedSRPO as PublishedSRPO
    from kdrl_lightning.prompts import HFPrompts as HFPrompts
    from kdrl_lightning.prompts import JSONLPrompts as JSONLPrompts
    from kdrl_lightning.prompts import KnightsAndKnavesPrompts as KnightsAndKnavesPrompts
    from kdrl_lightning.prompts import MixedPrompts as MixedPrompts
    from kdrl_lightning.prompts import ParsedPrompts as ParsedPrompts
    from kdrl_lightning.prompts import ReasoningGymPrompts as ReasoningGymPrompts
    from kdrl_lightning.prompts import StreamedHFPrompts as StreamedHFPrompts
    from kdrl_lightning.rewards import AnswerFeedback as AnswerFeedback
    from kdrl_lightning.rewards import BatchReward as BatchReward
    from kdrl_lightning.rewards import CodeReward as CodeReward
    from kdrl_lightning.rewards import ExactMatch as ExactMatch
    from kdrl_lightning.rewards import FormatReward as FormatReward
    from kdrl_lightning.rewards import KnightsAndKnavesReward as KnightsAndKnavesReward
    from kdrl_lightning.rewards import LengthPenalty as LengthPenalty
    from kdrl_lightning.rewards import MathReward as MathReward
    from kdrl_lightning.rewards import ReasoningGymReward as ReasoningGymReward
    from kdrl_lightning.rewards import RewardFailures as RewardFailures
    from kdrl_lightning.rewards import RewardFunction as RewardFunction
    from kdrl_lightning.rewards import RoutedReward as RoutedReward
    from kdrl_lightning.rewards import Sample as Sample
    from kdrl_lightning.rewards import TaskReward as TaskReward
    from kdrl_lightning.rewards import Verdict as Verdict
    from kdrl_lightning.rewards import WeightedRewards as WeightedRewards
    from kdrl_lightning.rollout.settings import RolloutSettings as RolloutSettings
    from kdrl_lightning.rollout.settings import TeacherCompletions as TeacherCompletions
    from kdrl_lightning.rollout_batch import RolloutBatch as RolloutBatch
    from kdrl_lightning.teachers import AdapterOffTeacher as AdapterOffTeacher
    from kdrl_lightning.teachers import CachedTeacher as CachedTeacher
    from kdrl_lightning.teachers import ColumnContext as ColumnContext
    from kdrl_lightning.teachers import CrossTokenizerTeacher as CrossTokenizerTeacher
    from kdrl_lightning.teachers import FeedbackContext as FeedbackContext
    from kdrl_lightning.teachers import FixedContext as FixedContext
    from kdrl_lightning.teachers import JoinedContext as JoinedContext
    from kdrl_lightning.teachers import LocalTeacher as LocalTeacher
    from kdrl_lightning.teachers import OtherProblemContext as OtherProblemContext
    from kdrl_lightning.teachers import PromptedTeacher as PromptedTeacher
    from kdrl_lightning.teachers import RoutedTeacher as RoutedTeacher
    from kdrl_lightning.teachers import SelfTeacher as SelfTeacher
    from kdrl_lightning.teachers import ServerTeacher as ServerTeacher
    from kdrl_lightning.teachers import SiblingContext as SiblingContext
    from kdrl_lightning.teachers import Teacher as Teacher
    from kdrl_lightning.teachers import TeacherPrompt as TeacherPrompt


# `Any`: type checkers take this return type as the type of every name found here.
def __getattr__(name: str) -> Any:
    if name in old_names.GONE:
        raise AttributeError(f"`{name}` is gone: {old_names.GONE[name]}")
    if name not in _HOME:
        raise AttributeError(f"module 'kdrl_lightning' has no attribute {name!r}")
    return getattr(import_module(f"kdrl_lightning.{_HOME[name]}"), name)
