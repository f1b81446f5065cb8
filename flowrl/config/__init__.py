"""A recipe: what it may say, and how it is read."""

from flowrl.config.load import load, to_yaml
from flowrl.config.recipe import (
    AlgorithmConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    ModelInitConfig,
    PoolConfig,
    Recipe,
    RewardConfig,
    TrainConfig,
    WarmStartConfig,
    WeightsConfig,
)

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
