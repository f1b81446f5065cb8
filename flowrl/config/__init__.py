"""A recipe: what it may say, and how it is read."""

from flowrl.config.algorithm import AlgorithmConfig
from flowrl.config.data import DataConfig, EvalConfig
from flowrl.config.load import load, to_yaml
from flowrl.config.machines import PoolConfig
from flowrl.config.model import LoRAConfig, ModelConfig, ModelInitConfig
from flowrl.config.recipe import Recipe
from flowrl.config.rollout import RewardConfig
from flowrl.config.train import CriticConfig, ReferenceConfig, TrainConfig, WarmStartConfig
from flowrl.config.weights import WeightsConfig

__all__ = [
    "AlgorithmConfig",
    "CriticConfig",
    "DataConfig",
    "EvalConfig",
    "LoRAConfig",
    "ModelConfig",
    "ModelInitConfig",
    "PoolConfig",
    "Recipe",
    "ReferenceConfig",
    "RewardConfig",
    "TrainConfig",
    "WarmStartConfig",
    "WeightsConfig",
    "load",
    "to_yaml",
]
