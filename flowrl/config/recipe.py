"""A whole recipe: frozen dataclasses, each field documented where it stands.

A value is checked in the `__post_init__` of the dataclass that holds it (a file for each part of a recipe); what spans
several is checked in `Recipe`. Reading and writing recipes is `load.py`. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flowrl.config.algorithm import AlgorithmConfig, StalenessConfig
from flowrl.config.data import DataConfig, EvalConfig
from flowrl.config.machines import NetworkConfig, PoolConfig, QueueSettings, RunConfig, StageConfig
from flowrl.config.model import ModelConfig
from flowrl.config.rollout import RewardConfig, RolloutConfig
from flowrl.config.train import TrainConfig, WarmStartConfig, WeightsConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe. `pools` adds to, or replaces, the four that exist: rollout, train, cpu, eval."""

    model: ModelConfig
    data: DataConfig
    reward: RewardConfig
    run: RunConfig
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    staleness: StalenessConfig = field(default_factory=StalenessConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig | None = None
    warm_start: WarmStartConfig | None = None
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    pools: dict[str, PoolConfig] = field(default_factory=dict)
    stages: dict[str, StageConfig] = field(default_factory=dict)
    queue: QueueSettings = field(default_factory=QueueSettings)
    network: NetworkConfig = field(default_factory=NetworkConfig)

    def __post_init__(self) -> None:
        if self.eval is not None and self.eval.path is None and self.data.held_out == 0:
            raise ValueError("eval.path: missing; name a file, or set data.held_out above 0")
        if self.warm_start is not None and self.data.dev == 0:
            raise ValueError("data.dev: 0; warm_start needs a development set")
        if self.network.interface != "lo" and not self.network.trusted:
            raise ValueError(
                "network.trusted: false; torch RPC has no secret and unpickles, so a run on network.interface="
                f"{self.network.interface} is refused unless you say that the network is closed"
            )
