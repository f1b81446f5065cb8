"""A whole recipe: frozen dataclasses, each field documented where it stands.

A value is checked in the `__post_init__` of the dataclass that holds it (a file for each part of a recipe); what spans
several is checked in `Recipe`. Reading and writing recipes is `load.py`. Nothing here imports torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from flowrl.algorithms.declarations import ADVANTAGES
from flowrl.config.algorithm import AlgorithmConfig, StalenessConfig
from flowrl.config.data import DataConfig, EvalConfig
from flowrl.config.machines import NetworkConfig, PoolConfig, QueueSettings, RunConfig, StageConfig
from flowrl.config.model import ModelConfig
from flowrl.config.producers import ProducerConfig
from flowrl.config.rollout import EPISODE_REWARD, EPISODES, RewardConfig, RolloutConfig
from flowrl.config.train import CriticConfig, ReferenceConfig, TrainConfig, WarmStartConfig
from flowrl.config.weights import WeightsConfig

# Updates after which a token of segment_ppo needs the proximal stage.
LEAST_LAG = 2
SINGLE_TURN = "single_turn"
ROLLOUT = "rollout"
NAME = re.compile(r"[A-Za-z][\w-]*")
WORKERS = (
    *(ROLLOUT, "train", "warm_start", "evaluate", "proximal", "reward", "advantage", "tied"),
    *("stages", "queue", "relay"),
)
"""Names of our stages and workers, there or not."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole recipe. `pools` adds to, or replaces, the four that exist: rollout, train, cpu, eval. `producers`: by
    name, rollout stages beside the one that `rollout` describes."""

    model: ModelConfig
    data: DataConfig
    reward: RewardConfig
    run: RunConfig
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    staleness: StalenessConfig = field(default_factory=StalenessConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    producers: dict[str, ProducerConfig] = field(default_factory=dict)
    train: TrainConfig = field(default_factory=TrainConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
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
        refuse_unsuitable_algorithm(self)
        check_reward_of_episodes(self)
        refuse_incomplete_shares(self)
        refuse_readers_without_files(self)
        if self.run.determinism == "strict":
            refuse_what_is_not_deterministic(self)
        if self.network.interface != "lo" and not self.network.trusted:
            raise ValueError(
                "network.trusted: false; torch RPC has no secret and unpickles, so a run on network.interface="
                f"{self.network.interface} is refused unless you say that the network is closed"
            )
        refuse_unsuitable_producers(self)

    def producer(self, name: str) -> Recipe:
        """As the rollout stage of that name has it: `rollout` is what it says, and it knows of no other."""
        given = self.producers.get(name)
        return self if given is None else replace(self, rollout=given.rollout(self.rollout), producers={})

    @property
    def rollout_stages(self) -> tuple[str, ...]:
        return (ROLLOUT, *self.producers)


def refuse_unsuitable_producers(recipe: Recipe) -> None:
    """Those that do not stand beside `rollout`; and what is wrong with one, by its name."""
    if recipe.producers and hands_over_batches(recipe):
        raise ValueError(
            f"producers: {sorted(recipe.producers)}; rollout.handover=batch and run.determinism=strict deal an update "
            "out to the engines of one stage"
        )
    servers = list(recipe.rollout.urls)
    for name in recipe.producers:
        if not NAME.fullmatch(name):
            raise ValueError(f"producers.{name}: a name has letters, digits, '_' and '-', and begins with a letter")
        if name in (*WORKERS, *recipe.stages):
            raise ValueError(f"producers.{name}: there is a worker or a stage of that name")
        try:
            urls = recipe.producer(name).rollout.urls
        except ValueError as error:
            where = "." if str(error).startswith("rollout.") else ": "
            raise ValueError(f"producers.{name}{where}{str(error).removeprefix('rollout.')}") from error
        if shared := sorted(set(servers).intersection(urls)):
            raise ValueError(f"producers.{name}.urls: {shared}; another rollout stage has these servers")
        servers += urls


def takes_episode_reward(recipe: Recipe) -> bool:
    """Whether the rewards are those that episodes give."""
    return recipe.reward.name == EPISODE_REWARD


def check_reward_of_episodes(recipe: Recipe) -> None:
    """An environment's reward is the row's; a single turn and tools give none."""
    name = recipe.rollout.episode.removeprefix(f"{EPISODES}:")
    if name == "environment" and not takes_episode_reward(recipe):
        raise ValueError(
            f"reward: {recipe.reward.name or recipe.reward.path}; rollout.episode=environment gives the rewards, "
            f"set reward.name={EPISODE_REWARD}"
        )
    if name != "single_turn" and recipe.rollout.handover == "batch":
        raise ValueError(f"rollout.handover: 'batch'; hands on whole batches, and an episode of {name} may fail")
    if takes_episode_reward(recipe) and recipe.warm_start is not None:
        raise ValueError(f"warm_start: needs a reward function, and reward.name is {EPISODE_REWARD!r}")
    if name in ("single_turn", "multi_turn") and takes_episode_reward(recipe):
        raise ValueError(f"reward.name: {EPISODE_REWARD!r}; rollout.episode={name} gives no reward")


def refuse_incomplete_shares(recipe: Recipe) -> None:
    """Where engines hand over whole shares, no group may be replaced underway."""
    rollout = recipe.rollout
    if not hands_over_batches(recipe):
        return
    for name in ("filter_tied", "oversampling", "redundancy"):
        if getattr(rollout, name):
            raise ValueError(
                f"rollout.{name}: {getattr(rollout, name)}; rollout.handover=batch and run.determinism=strict hand "
                "over shares that are settled from the start"
            )


def refuse_readers_without_files(recipe: Recipe) -> None:
    """Under `weights.transport: collective` a version lies nowhere; whoever wants a directory gets none."""
    if recipe.weights.transport != "collective":
        return
    if recipe.rollout.engine != "embedded":
        raise ValueError(
            f"weights.transport: 'collective'; rollout.engine={recipe.rollout.engine} takes weights as directories, "
            "use shared_memory or disk"
        )
    if needs_segments(recipe):
        raise ValueError(
            "weights.transport: 'collective'; algorithm.loss=segment_ppo with staleness.max of 2 or more scores tokens "
            "under published directories, use shared_memory or disk"
        )


def refuse_what_is_not_deterministic(recipe: Recipe) -> None:
    """`run.determinism: strict` holds where nothing depends on what happens first; each other setting is refused."""
    episode = recipe.rollout.episode.removeprefix("flowrl.rollout.episodes:")
    needed = {
        "staleness.max": (recipe.staleness.max, 0, "what is trained when would depend on timing"),
        "staleness.late": (recipe.staleness.late, "wait", "what is dropped would depend on timing"),
        "rollout.engine": (recipe.rollout.engine, "embedded", "only that engine batches the same way each time"),
        "rollout.episode": (episode, SINGLE_TURN, "later turns would join a batch at any time"),
    }
    for name, (value, wanted, reason) in needed.items():
        if value != wanted:
            raise ValueError(f"{name}: {value!r}; run.determinism=strict needs {wanted!r}: {reason}")


def refuse_unsuitable_algorithm(recipe: Recipe) -> None:
    """What the algorithm asks of rollout and of the graph."""
    algorithm, rollout = recipe.algorithm, recipe.rollout
    least = 1 if algorithm.has_own_advantage else ADVANTAGES[algorithm.advantage].least_group
    if rollout.group_size < least:
        raise ValueError(
            f"rollout.group_size: {rollout.group_size}; algorithm.advantage={algorithm.advantage} compares the samples "
            f"of a prompt and needs at least {least}"
        )
    if algorithm.overlong_buffer > rollout.max_tokens:
        raise ValueError(
            f"algorithm.overlong_buffer: {algorithm.overlong_buffer}; must not exceed rollout.max_tokens="
            f"{rollout.max_tokens}"
        )
    refuse_unsuitable_rewards(recipe)
    if algorithm.estimates_in_trainer and "advantage" in recipe.stages:
        raise ValueError(
            f"stages.advantage: {recipe.stages['advantage'].run!r}; the trainer computes advantages here, because "
            f"{algorithm.streaming()[1]}; set algorithm.advantage to a function of yours"
        )


def refuse_unsuitable_rewards(recipe: Recipe) -> None:
    """What filters by the reward, or gives one, where the advantage is made of more than that."""
    algorithm = recipe.algorithm
    if recipe.rollout.filter_tied and (algorithm.has_greedy_baseline or algorithm.score_weights):
        more = "the greedy sample's" if algorithm.has_greedy_baseline else "several scores"
        raise ValueError(
            f"rollout.filter_tied: True; algorithm.advantage={algorithm.advantage} compares {more}: a group "
            "whose rewards are all equal still teaches something"
        )
    if algorithm.score_weights and takes_episode_reward(recipe):
        raise ValueError(
            f"reward.name: {EPISODE_REWARD!r}; an episode gives one score, and algorithm.advantage=gdpo weighs several"
        )


def needs_segments(recipe: Recipe) -> bool:
    """The trainer cannot know a token's log-prob under the version after its own: that version is not the one it
    starts from. Only where a token may be two updates old."""
    return recipe.algorithm.loss == "segment_ppo" and recipe.staleness.max >= LEAST_LAG


def refuse_what_cannot_alternate(recipe: Recipe) -> None:
    """Where engines and trainer ranks take turns at a device, an engine may have to stop whatever it is doing, and
    frees the memory of its KV. At a bound of 0 it is never doing anything then."""
    rollout, reason = recipe.rollout, "pools.rollout and pools.train share devices, and take turns at them"
    if recipe.staleness.max > 0 and rollout.in_flight == "keep":
        raise ValueError(f"rollout.in_flight: 'keep'; {reason}: an engine frees its KV, so 'recompute' or 'abort'")
    if recipe.staleness.max > 0 and hands_over_batches(recipe):
        raise ValueError(f"rollout.handover: 'batch'; {reason}: a share would be interrupted at staleness.max above 0")
    if recipe.weights.transport == "collective":
        raise ValueError(f"weights.transport: 'collective'; {reason}, and send each other nothing: use shared_memory")


def is_strict(recipe: Recipe) -> bool:
    return recipe.run.determinism == "strict"


def hands_over_batches(recipe: Recipe) -> bool:
    return recipe.rollout.handover == "batch" or is_strict(recipe)


def refuse_uneven_shares(recipe: Recipe, num_engines: int) -> None:
    """Raises ValueError if an update does not divide among the engines."""
    if hands_over_batches(recipe) and recipe.train.batch_groups % num_engines:
        raise ValueError(
            f"train.batch_groups: {recipe.train.batch_groups}; rollout.handover=batch and run.determinism=strict need "
            f"a multiple of the {num_engines} engines"
        )
