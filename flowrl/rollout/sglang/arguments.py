"""From settings to the command line and environment of `sglang.launch_server`. Pure: starts nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

_MANAGED = ("model_path", "host", "port", "device", "weight_version", "skip_tokenizer_init")

_PARALLELISM = {"tp_size", "pp_size", "dp_size"}
# What a server needs to run without a GPU at all; sizes are those of a laptop. `server_args` may say otherwise.
_CPU_ARGUMENTS: dict[str, Any] = {
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "dtype": "float32",
    "mem_fraction_static": 0.3,
    "max_total_tokens": 16384,
}


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """python: the interpreter that has SGLang. port 0: a free one. server_args: SGLang's own, by their own names with
    underscores (`tp_size`); True is a bare flag, False and None leave the argument out. env: added to the environment.
    log_path: the server's output, appended to."""

    log_path: Path
    python: str = sys.executable
    device: str = "cuda"
    host: str = "127.0.0.1"
    port: int = 0
    server_args: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    startup_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device: {self.device!r}; one of 'cpu', 'cuda'")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port: {self.port}; 0 for a free one, or a port")
        if self.startup_timeout_s <= 0:
            raise ValueError(f"startup_timeout_s: {self.startup_timeout_s}; must be positive")
        for name in self.server_args:
            if name in _MANAGED:
                raise ValueError(f"server_args.{name}: {self.server_args[name]!r}; set by the engine itself")
            if not name.isidentifier():
                raise ValueError(f"server_args: {name!r}; names are written with underscores, like tp_size")


def gpus_of_servers(devices: Sequence[str], servers: int, server_args: Mapping[str, Any]) -> list[dict[str, int]]:
    """The arguments that put each of `servers` on its share of a worker's `devices`, dealt out in order; none of them
    on a CPU. A share of several GPUs is one of tensor parallelism, unless `server_args` divide it in another way.
    Raises ValueError naming the field for GPUs that do not divide, or that no step leads through."""
    gpus = [int(device.partition(":")[2]) for device in devices if device.startswith("cuda:")]
    if not gpus:
        return [{}] * servers
    each, left_over = divmod(len(gpus), servers)
    if left_over or not each:
        raise ValueError(f"rollout.servers: {servers}; a worker's devices, {list(devices)}, must divide among them")
    found = []
    for first in range(0, len(gpus), each):
        share = gpus[first : first + each]
        steps = {after - before for before, after in pairwise(share)}
        if len(steps) > 1 or any(step < 1 for step in steps):
            raise ValueError(
                f"pools.*.devices: {list(devices)}; SGLang reaches the GPUs of a server by one step: rising, evenly"
            )
        chosen = {"base_gpu_id": share[0]}
        if each > 1:
            chosen["gpu_id_step"] = steps.pop()
            if not server_args.keys() & _PARALLELISM:
                chosen["tp_size"] = each
        found.append({name: value for name, value in chosen.items() if name not in server_args})
    return found


def command_line(settings: ServerSettings, model: Path, version: int, port: int) -> list[str]:
    """No tokenizer: the engine deals in ids, and a server without one has less to do."""
    chosen: dict[str, Any] = {"log_level_http": "warning", "incremental_streaming_output": True}
    if settings.device == "cpu":
        chosen |= _CPU_ARGUMENTS
    chosen |= settings.server_args
    chosen |= {
        "model_path": str(model.absolute()),
        "host": settings.host,
        "port": port,
        "device": settings.device,
        "weight_version": str(version),
        "skip_tokenizer_init": True,
    }
    flags = [word for name, value in chosen.items() for word in _flag(name, value)]
    return [settings.python, "-m", "sglang.launch_server", *flags]


def environment(settings: ServerSettings, inherited: Mapping[str, str]) -> dict[str, str]:
    """Another interpreter must not see this one's packages."""
    env = dict(inherited)
    if settings.python != sys.executable:
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
            env.pop(name, None)
    if settings.device == "cpu":
        env["SGLANG_USE_CPU_ENGINE"] = "1"
    return {**env, **settings.env}


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    if isinstance(value, Mapping):
        return [flag, json.dumps(dict(value))]
    if isinstance(value, (list, tuple)):
        return [flag, *(str(item) for item in value)]
    return [flag, str(value)]
