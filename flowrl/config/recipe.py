"""What a recipe may say: frozen dataclasses, each field documented where it stands.

A value is checked in the `__post_init__` of the dataclass that holds it; what spans several is checked in `Recipe`.
Reading and writing recipes is `load.py`. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flowrl.config.checks import check_at_least, check_dotted, check_one_of, check_positive


@dataclass(frozen=True, kw_only=True)
class ModelInitConfig:
    """A small Qwen3 to make on the spot when `model.path` does not exist: random weights, a tokenizer of characters.
    rope_theta: base of the rotary positions; short contexts learn faster with a small one. lowercase: the tokenizer
    turns capitals into small letters, for tasks to which they mean nothing."""

    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    intermediate_size: int = 384
    max_tokens: int = 256
    rope_theta: float = 10_000.0
    lowercase: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "layers", "heads", "kv_heads", "intermediate_size", "max_tokens"):
            check_at_least(f"model.init.{name}", getattr(self, name), 1)
        check_positive("model.init.rope_theta", self.rope_theta)
        if self.hidden_size % self.heads:
            raise ValueError(f"model.init.heads: {self.heads}; must divide model.init.hidden_size={self.hidden_size}")
        if self.heads % self.kv_heads:
            raise ValueError(f"model.init.kv_heads: {self.kv_heads}; must divide model.init.heads={self.heads}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """path: a Hugging Face directory. dtype: what engines are served; the trainer keeps float32 masters."""

    path: str
    dtype: str = "float32"
    init: ModelInitConfig | None = None

    def __post_init__(self) -> None:
        check_one_of("model.dtype", self.dtype, ("float32", "bfloat16"))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts. source: `auto` reads the file at `path` (JSONL or parquet, GSM8K's own columns too); `reasoning_gym`
    draws `size` items of `task`, keeps the distinct ones, and sets `held_out` and `dev` of them apart by `seed`."""

    path: str | None = None
    source: str = "auto"
    task: str | None = None
    size: int = 10_000
    options: dict[str, Any] = field(default_factory=dict)
    held_out: int = 0
    dev: int = 0
    seed: int = 0
    max_prompt_tokens: int = 1024

    def __post_init__(self) -> None:
        check_one_of("data.source", self.source, ("auto", "reasoning_gym"))
        if self.source == "auto" and self.path is None:
            raise ValueError("data.path: missing; name a JSONL or parquet file, or set data.source=reasoning_gym")
        if self.source == "reasoning_gym" and self.task is None:
            raise ValueError("data.task: missing; data.source=reasoning_gym needs the name of a task")
        for name in ("size", "max_prompt_tokens"):
            check_at_least(f"data.{name}", getattr(self, name), 1)
        for name in ("held_out", "dev"):
            check_at_least(f"data.{name}", getattr(self, name), 0)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation of every `every`-th version, the first and the last. path: a file like `data.path`; without one, the
    prompts that `data.held_out` set apart. limit: at most so many prompts. Never delays training."""

    path: str | None = None
    every: int = 100
    samples: int = 1
    temperature: float = 0.0
    limit: int = 1000

    def __post_init__(self) -> None:
        for name in ("every", "samples", "limit"):
            check_at_least(f"eval.{name}", getattr(self, name), 1)
        check_at_least("eval.temperature", self.temperature, 0)
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"eval.samples: {self.samples}; greedy samples are all alike, set eval.temperature above 0"
            )


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """name: `grpo` (advantages within the group), `dr_grpo` (not divided by the group's spread).
    clip_low, clip_high, dual_clip: of the PPO ratio to the policy that sampled; dual_clip null turns it off.
    aggregate: how token losses become one number. skip_tied: leave out of the forward pass the rows whose advantage is
    zero; gradient and denominators stay the same."""

    name: str = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 3.0
    aggregate: str = "token-mean"
    skip_tied: bool = True

    def __post_init__(self) -> None:
        check_one_of("algorithm.name", self.name, ("grpo", "dr_grpo"))
        modes = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean")
        check_one_of("algorithm.aggregate", self.aggregate, modes)
        check_positive("algorithm.clip_low", self.clip_low)
        check_positive("algorithm.clip_high", self.clip_high)
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"algorithm.dual_clip: {self.dual_clip}; must be above 1, or null")


@dataclass(frozen=True, kw_only=True)
class StalenessConfig:
    """max: no token is consumed that is older by more updates; 0 is synchronous. late: what happens when unready rows
    that are due hold ready ones up: `wait` for them, or `drop` them and sample their prompts anew."""

    max: int = 2
    late: str = "wait"

    def __post_init__(self) -> None:
        check_at_least("staleness.max", self.max, 0)
        check_one_of("staleness.late", self.late, ("wait", "drop"))


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """engine: `embedded` (PyTorch, in the worker) or `sglang` (servers). in_flight: what a weight update does to the KV
    of running responses: `keep` or `recompute` it. concurrency: groups an engine works on at once. server_args and
    python are SGLang's: arguments by their own names, and the interpreter that has it installed."""

    engine: str = "embedded"
    group_size: int = 8
    temperature: float = 1.0
    max_tokens: int = 256
    concurrency: int = 64
    in_flight: str = "keep"
    episode: str = "flowrl.rollout.episodes:single_turn"
    server_args: dict[str, Any] = field(default_factory=dict)
    python: str | None = None

    def __post_init__(self) -> None:
        check_one_of("rollout.engine", self.engine, ("embedded", "sglang"))
        check_one_of("rollout.in_flight", self.in_flight, ("keep", "recompute"))
        for name in ("group_size", "max_tokens", "concurrency"):
            check_at_least(f"rollout.{name}", getattr(self, name), 1)
        check_positive("rollout.temperature", self.temperature)
        check_dotted("rollout.episode", self.episode)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """name: a reward of ours. path: yours, `file.py:function` or `package.module:function`, taking
    `(data_source, solution_str, ground_truth, extra_info)`. One of the two."""

    name: str | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        if (self.name is None) == (self.path is None):
            raise ValueError(f"reward: name={self.name!r}, path={self.path!r}; exactly one of the two must be given")
        if self.path is not None:
            check_dotted("reward.path", self.path)


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """Supervised steps on demonstrations (the data's answers) before the first rollout, until greedy accuracy on the
    development set (`data.dev`) passes `until_accuracy`, checked every `check_every` steps, or `max_steps` are done."""

    until_accuracy: float = 0.3
    max_steps: int = 400
    check_every: int = 8
    batch_rows: int = 256
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        for name in ("max_steps", "check_every", "batch_rows"):
            check_at_least(f"warm_start.{name}", getattr(self, name), 1)
        check_positive("warm_start.learning_rate", self.learning_rate)
        if not 0 < self.until_accuracy <= 1:
            raise ValueError(f"warm_start.until_accuracy: {self.until_accuracy}; must be in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """An update consumes `batch_groups` groups in one optimizer step, in micro-batches of at most
    `micro_batch_tokens` tokens. The learning rate warms up over `warmup_steps`, then follows `schedule` to
    `final_learning_rate_ratio` of itself at `decay_steps` (default: `steps`). grad_clip: the global norm."""

    batch_groups: int = 64
    steps: int = 100
    learning_rate: float = 1e-6
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    warmup_steps: int = 10
    schedule: str = "constant"
    decay_steps: int | None = None
    final_learning_rate_ratio: float = 0.1
    micro_batch_tokens: int = 8192
    compute_dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_groups", "steps", "micro_batch_tokens"):
            check_at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("warmup_steps", "weight_decay"):
            check_at_least(f"train.{name}", getattr(self, name), 0)
        check_positive("train.learning_rate", self.learning_rate)
        check_positive("train.grad_clip", self.grad_clip)
        check_one_of("train.schedule", self.schedule, ("constant", "linear", "cosine"))
        check_one_of("train.compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name}: {getattr(self, name)}; must be in [0, 1)")
        if not 0 <= self.final_learning_rate_ratio <= 1:
            raise ValueError(f"train.final_learning_rate_ratio: {self.final_learning_rate_ratio}; must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """transport: `shared_memory` (each node's trainer rank writes to the node's tmpfs) or `disk` (a directory, `dir`,
    that all nodes see). buffers: versions kept."""

    transport: str = "shared_memory"
    dir: str | None = None
    buffers: int = 3

    def __post_init__(self) -> None:
        check_one_of("weights.transport", self.transport, ("shared_memory", "disk"))
        check_at_least("weights.buffers", self.buffers, 2)
        if (self.transport == "disk") != (self.dir is not None):
            raise ValueError(f"weights.dir: {self.dir!r}; transport=disk needs it, and only that takes it")


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Where workers run. nodes: indices, empty for all. workers: a node. threads: each worker may use.
    devices: of a node, dealt out one to a worker."""

    nodes: list[int] = field(default_factory=list)
    workers: int = 1
    threads: int = 1
    devices: list[str] = field(default_factory=lambda: ["cpu"])

    def __post_init__(self) -> None:
        check_at_least("pools.*.workers", self.workers, 1)
        check_at_least("pools.*.threads", self.threads, 1)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stage of yours. run: `file.py:Class` or `package.module:Class` with `process(rows) -> columns`."""

    run: str
    reads: list[str] = field(default_factory=list)
    optional: list[str] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)
    unit: str = "row"
    pool: str = "cpu"
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_one_of("stages.*.unit", self.unit, ("row", "group"))
        check_dotted("stages.*.run", self.run)


@dataclass(frozen=True, kw_only=True)
class QueueSettings:
    """byte_limit_mb: of one shard; a full one makes producers wait. lease_s: after which an unacknowledged row is
    delivered again."""

    byte_limit_mb: int = 1024
    lease_s: float = 10.0

    def __post_init__(self) -> None:
        check_at_least("queue.byte_limit_mb", self.byte_limit_mb, 1)
        check_positive("queue.lease_s", self.lease_s)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """interface: that nodes reach each other on; `lo` keeps all on one machine. trusted: says that the network is
    closed, without which a run off loopback is refused, because torch RPC has no secret. (The queue has one of its own
    there: node 0 makes it, and the nodes exchange it.)"""

    interface: str = "lo"
    trusted: bool = False


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run leaves its files: `dir`/`name`. checkpoint_every: updates, 0 for none but the last. samples_every:
    groups, two samples of which are written for people to read. session_dir: a directory on tmpfs for sockets and
    weights, by default one of the user's in /dev/shm."""

    name: str
    dir: str = "runs"
    checkpoint_every: int = 0
    checkpoints_kept: int = 2
    samples_every: int = 10
    session_dir: str | None = None

    def __post_init__(self) -> None:
        check_at_least("run.checkpoint_every", self.checkpoint_every, 0)
        check_at_least("run.samples_every", self.samples_every, 1)
        check_at_least("run.checkpoints_kept", self.checkpoints_kept, 1)
        if not self.name or "/" in self.name:
            raise ValueError(f"run.name: {self.name!r}; must be a directory name")


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
