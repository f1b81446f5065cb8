"""What a recipe says of rollout and of rewards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flowrl.config.checks import check_at_least, check_dotted, check_one_of, check_positive
from flowrl.config.episodes import EnvironmentConfig, SandboxConfig

EPISODES = "flowrl.rollout.episodes"
EPISODE_REWARD = "episode"
BUILTIN_TOOLS = ("calculator", "python")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """engine: `embedded` (PyTorch, in the worker) or `sglang` (servers). in_flight: what a weight update does to the KV
    of running responses: `keep` or `recompute` it, or `abort` them and resume each from its tokens. concurrency: groups
    an engine works on at once. server_args and python are SGLang's: arguments by their own names, and the interpreter
    that has it installed. handover: `stream` hands every response on as it ends and takes new weights at once; `batch`
    hands on an engine's whole share of an update and takes new weights between two shares, which at staleness.max=1 is
    one-step-off training.

    servers: SGLang servers that each engine launches; urls: those that run already, instead. routed_experts: they say
    which experts of a mixture each token went through, in the column `routed_experts`. stop_strings: end a
    response, with the token that completes one. filter_tied: a group whose rewards are all equal teaches nothing, is
    dropped and replaced by another prompt's. oversampling: groups beyond those that updates have room for; what
    is left over of them at its deadline is dropped. redundancy: samples a group beyond group_size, of which the first
    group_size to end are kept. Both favour short responses.

    episode: `single_turn`, `multi_turn` (with `tools`), `environment`, or yours by dotted path. max_tokens: of a whole
    response, all turns and what tools and environment say; turn_tokens: of one turn; max_turns: of an episode.
    episode_timeout_s: an episode that takes longer has failed. tools: `calculator`, `python`, or functions by dotted
    path. tool_parser: how calls are found in what the model writes. tool_output_tokens: where a tool's answer is cut;
    tool_timeout_s: how long it may take. sandbox: of the `python` tool."""

    engine: str = "embedded"
    group_size: int = 8
    temperature: float = 1.0
    max_tokens: int = 256
    concurrency: int = 64
    in_flight: str = "keep"
    episode: str = "flowrl.rollout.episodes:single_turn"
    server_args: dict[str, Any] = field(default_factory=dict)
    python: str | None = None
    servers: int = 1
    urls: list[str] = field(default_factory=list)
    routed_experts: bool = False
    stop_strings: list[str] = field(default_factory=list)
    filter_tied: bool = False
    oversampling: int = 0
    redundancy: int = 0
    handover: str = "stream"
    turn_tokens: int | None = None
    max_turns: int = 8
    episode_timeout_s: float = 600.0
    tools: list[str] = field(default_factory=list)
    tool_parser: str = "flowrl.rollout.tools.calls:parse_calls"
    tool_output_tokens: int = 256
    tool_timeout_s: float = 10.0
    environment: EnvironmentConfig | None = None
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)

    def __post_init__(self) -> None:
        check_one_of("rollout.handover", self.handover, ("stream", "batch"))
        check_one_of("rollout.engine", self.engine, ("embedded", "sglang"))
        check_one_of("rollout.in_flight", self.in_flight, ("keep", "recompute", "abort"))
        for name in ("group_size", "max_tokens", "concurrency"):
            check_at_least(f"rollout.{name}", getattr(self, name), 1)
        check_positive("rollout.temperature", self.temperature)
        check_episode(self)
        check_servers(self)
        for name in ("oversampling", "redundancy"):
            check_at_least(f"rollout.{name}", getattr(self, name), 0)
        if "" in self.stop_strings:
            raise ValueError(f"rollout.stop_strings: {self.stop_strings}; an empty one ends every response at once")
        if self.filter_tied and self.group_size == 1:
            raise ValueError("rollout.filter_tied: True; rollout.group_size=1 makes every group tied")


def check_servers(rollout: RolloutConfig) -> None:
    """What only SGLang's servers have is refused elsewhere."""
    check_at_least("rollout.servers", rollout.servers, 1)
    if rollout.urls and rollout.servers > 1:
        raise ValueError(f"rollout.servers: {rollout.servers}; rollout.urls names servers that run already")
    for name, is_set in (
        ("servers", rollout.servers > 1),
        ("urls", bool(rollout.urls)),
        ("routed_experts", rollout.routed_experts),
    ):
        if is_set and rollout.engine != "sglang":
            raise ValueError(f"rollout.{name}: {getattr(rollout, name)}; only rollout.engine=sglang has that")


def check_episode(rollout: RolloutConfig) -> None:
    """What the recipe says of episodes, and that no part of it stands idle."""
    name = rollout.episode.removeprefix(f"{EPISODES}:")
    if ":" in name:
        check_dotted("rollout.episode", name)
    else:
        check_one_of("rollout.episode", name, ("single_turn", "multi_turn", "environment"))
    for limit in ("max_turns", "tool_output_tokens"):
        check_at_least(f"rollout.{limit}", getattr(rollout, limit), 1)
    for limit in ("episode_timeout_s", "tool_timeout_s"):
        check_positive(f"rollout.{limit}", getattr(rollout, limit))
    if rollout.turn_tokens is not None:
        check_at_least("rollout.turn_tokens", rollout.turn_tokens, 1)
    if rollout.in_flight == "abort" and rollout.stop_strings:
        raise ValueError(
            "rollout.stop_strings: an aborted response is resumed from its tokens, and would miss a string "
            "that began before; set rollout.in_flight=keep or recompute"
        )
    check_dotted("rollout.tool_parser", rollout.tool_parser)
    for tool in rollout.tools:
        if ":" in tool:
            check_dotted("rollout.tools", tool)
        else:
            check_one_of("rollout.tools", tool, BUILTIN_TOOLS)
    if name == "single_turn" and rollout.turn_tokens is not None:
        raise ValueError(f"rollout.turn_tokens: {rollout.turn_tokens}; a single turn has max_tokens")
    if rollout.tools and name in ("single_turn", "environment"):
        raise ValueError(f"rollout.tools: {rollout.tools}; rollout.episode={name} calls none, set multi_turn")
    if name == "multi_turn" and not rollout.tools:
        raise ValueError("rollout.tools: []; rollout.episode=multi_turn needs at least one")
    if name == "environment" and rollout.environment is None:
        raise ValueError("rollout.environment: missing; rollout.episode=environment needs its path")
    if name in ("single_turn", "multi_turn") and rollout.environment is not None:
        raise ValueError(f"rollout.environment: {rollout.environment.path!r}; rollout.episode={name} has none")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """name: a reward of ours; `episode`: the one that the episode itself gives. path: yours, `file.py:function` or
    `package.module:function`, taking `(data_source, solution_str, ground_truth, extra_info)`. One of the two.
    concurrency: rows that are scored at once, each in a call and a thread of its own, where a call takes long (a judge,
    a program to be run); 1 scores what is ready one row after the other."""

    name: str | None = None
    path: str | None = None
    concurrency: int = 1

    def __post_init__(self) -> None:
        check_at_least("reward.concurrency", self.concurrency, 1)
        if (self.name is None) == (self.path is None):
            raise ValueError(f"reward: name={self.name!r}, path={self.path!r}; exactly one of the two must be given")
        if self.path is not None:
            check_dotted("reward.path", self.path)
