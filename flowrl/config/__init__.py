"""A recipe: what it may say, and how it is read."""

from flowrl.config.algorithm import AlgorithmConfig
from flowrl.config.data import DataConfig, EvalConfig
from flowrl.config.load import load, to_yaml
from flowrl.config.machines import PoolConfig
from flowrl.config.model import ModelConfig, ModelInitConfig
from flowrl.config.recipe import Recipe
from flowrl.config.rollout import RewardConfig
from flowrl.config.train import TrainConfig, WarmStartConfig, WeightsConfig

__all__ = [
    "AlgorithmConfig",
    "DataConfig",
    "EvalConfig",
    "ModelConfig",
    "ModelInitConfig",
    "PoolConfig",
    "Recipe",
    "RewardConfig",
    "TrainConfig",
    "WarmStartConfig",
    "WeightsConfig",
    "load",
    "to_yaml",
]
