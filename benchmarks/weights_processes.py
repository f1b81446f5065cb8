"""What `weights.py` starts, trainer ranks and engines: `python -P benchmarks/weights_processes.py rank:0 SETTINGS`.

Each prints, as JSON, the moments on the machine's one monotonic clock at which its part of each round began or ended.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

NUM_RANKS = 2
WARM_UPS = 5

# A trainer rank.


def run_rank(rank: int, settings: dict[str, Any]) -> dict[str, Any]:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from flowrl.trainer.world import join

    torch.set_num_threads(1)
    work, rounds = Path(settings["work"]), settings["rounds"]
    found: dict[str, Any] = {}
    with join(rank=rank, world_size=NUM_RANKS, file=work / "world", interface="lo") as world:
        found |= publish_rounds(rank, world, work, settings["engines"], rounds)
    world_size = NUM_RANKS + settings["engines"]
    store = dist.FileStore(str(work / "world-all"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=600))
    try:
        found |= gather_rounds(rank, work, Path(settings["disk"]), world_size, settings["slow_rounds"])
    finally:
        dist.destroy_process_group()
    return found


def publish_rounds(rank: int, world: Any, work: Path, engines: int, rounds: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    import zmq

    from flowrl.weights.publish import Publisher
    from flowrl.weights.store import WeightStore

    policy = load(work / "model", world)
    context = zmq.Context()
    sockets = [context.socket(zmq.PUSH) for _ in range(engines)] if rank == 0 else []
    for index, opened in enumerate(sockets):
        opened.connect(f"ipc://{work}/engine-{index}")

    def tell(version: int, path: Path) -> None:
        for opened in sockets:
            opened.send_json([version, str(path)])

    store = WeightStore(work / "weights", 3) if rank == 0 else None
    publisher = Publisher(policy, work / "model", store, "bfloat16", on_published=tell)
    publisher.check_names()
    found: dict[str, Any] = {name: [] for name in ("flowrl", "pause", "cast", "collective", "collective_pause")}
    found["bytes"] = publisher.num_bytes
    shards = list(publisher._locals().values())
    warm = torch.zeros(sum(shard.numel() for shard in shards), dtype=torch.bfloat16)

    def publish_each(name: str, pause: str, publisher: Publisher, versions: range) -> None:
        for version in versions:
            change(shards)
            dist.barrier()
            found["cast"].append(timed(lambda: cast(shards, warm)))
            dist.barrier()
            found[name].append(time.monotonic())
            publisher.begin(version)
            found[pause].append(time.monotonic() - found[name][-1])
            time.sleep(0.05 + publisher.num_bytes / 1e9)  # the engines load meanwhile, on the same cores
            wait_for(work, version, engines)
            dist.barrier()
        publisher.close()

    publish_each("flowrl", "pause", publisher, range(rounds))
    direct = Publisher(
        policy, work / "model", None, "bfloat16", collective=collective_of(work, engines), on_published=tell
    )
    publish_each("collective", "collective_pause", direct, range(rounds, 2 * rounds))
    for opened in sockets:
        opened.close(linger=0)
    context.term()
    source = torch.zeros(publisher.num_bytes, dtype=torch.uint8)
    target = torch.zeros(publisher.num_bytes, dtype=torch.uint8)
    copies = []
    if rank == 0:
        copies = [timed(lambda: target.copy_(source)) for _ in range(rounds)]
    dist.barrier()
    found["memcpy"] = statistics.median(copies[WARM_UPS:]) if copies else 0.0
    return found


def collective_of(work: Path, engines: int) -> Any:
    """Engines leave word of themselves in files."""
    import torch

    from flowrl.weights.collective.giver import Terms
    from flowrl.weights.collective.writer import Collective

    def listen(meet: Any) -> None:
        for index in range(engines):
            while not (work / f"news-{index}.json").exists():
                time.sleep(0.01)
            meet(json.loads((work / f"news-{index}.json").read_text()))

    return Collective(Terms(torch.device("cpu"), "", 120.0), listen)


def load(path: Path, world: Any) -> Any:
    """The model as the trainer shards it: each layer, then the rest."""
    import torch
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for layer in lm.model.layers:
        fully_shard(layer, mesh=world.mesh)
    fully_shard(lm, mesh=world.mesh)
    return lm


def change(shards: list[Any]) -> None:
    for shard in shards:
        shard.mul_(1.01)


def cast(shards: list[Any], target: Any) -> None:
    begin = 0
    for shard in shards:
        target[begin : begin + shard.numel()].view(shard.shape).copy_(shard)
        begin += shard.numel()


def timed(action: Any) -> float:
    started = time.monotonic()
    action()
    return time.monotonic() - started


def wait_for(work: Path, version: int, engines: int) -> None:
    deadline = time.monotonic() + 300
    for index in range(engines):
        while not (work / f"served-{index}-{version}").exists():
            assert time.monotonic() < deadline, f"engine {index} has not served version {version}"
            time.sleep(0.002)


def gather_rounds(rank: int, work: Path, disk: Path, world_size: int, rounds: int) -> dict[str, Any]:
    """(a) and (b). Engines are ranks behind the trainers'."""
    from types import SimpleNamespace

    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file
    from torch.distributed.device_mesh import DeviceMesh

    engines = list(range(NUM_RANKS, world_size))
    receivers = dist.new_group([0, *engines])
    lm = load(work / "model", SimpleNamespace(mesh=DeviceMesh("cpu", list(range(NUM_RANKS)))))
    names = [name for name, _ in lm.named_parameters()]
    parameters = dict(lm.named_parameters())
    found: dict[str, Any] = {"gather": [], "directory": []}
    for way in found:
        for version in range(rounds):
            dist.barrier()
            found[way].append(time.monotonic())
            state = {}
            for name in names:
                full = parameters[name].detach().full_tensor().to(torch.bfloat16)
                if rank == 0 and way == "gather":
                    dist.broadcast(full, 0, group=receivers)
                elif rank == 0:
                    state[name] = full
            if way == "directory":
                if rank == 0:
                    lm.config.save_pretrained(disk / f"v{version}")
                    save_file(state, disk / f"v{version}" / "model.safetensors", metadata={"format": "pt"})
                dist.barrier()
            dist.barrier()
    return found


# An engine.


def run_engine(index: int, settings: dict[str, Any]) -> dict[str, Any]:
    import asyncio
    from datetime import timedelta

    import torch
    import torch.distributed as dist
    import zmq

    from flowrl.rollout.embedded.engine import EmbeddedEngine
    from flowrl.weights import loading

    torch.set_num_threads(1)
    work, rounds = Path(settings["work"]), settings["rounds"]
    copy_each = loading._load_each
    context = zmq.Context()
    news = context.socket(zmq.PULL)
    news.bind(f"ipc://{work}/engine-{index}")

    async def follow() -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
        engine = EmbeddedEngine(dtype="bfloat16", max_batch=1, max_model_tokens=64, threads=1)
        await engine.start(work / "model", 0)
        served: dict[str, list[float]] = {"flowrl": [], "collective": []}
        receiver = make_receiver(work, index)
        if settings["no_copy"]:
            loading._load_each = lambda *_: None
        for number in range(2 * rounds):
            if number == rounds:
                loading._load_each = copy_each
                receiver.meet()
            version, path = news.recv_json()
            if number < rounds:
                await engine.load_weights(Path(path), version + 1)
            else:
                assert receiver.open(version)
                await engine.load_weights(receiver.receive, version + 1)
            served["flowrl" if number < rounds else "collective"].append(time.monotonic())
            (work / f"served-{index}-{version}").touch()
        receiver.close()
        model = engine._core._model
        await engine.close()
        return served, dict(model.named_parameters())

    served, parameters = asyncio.run(follow())
    news.close()
    context.term()
    world_size, rank = NUM_RANKS + settings["engines"], NUM_RANKS + index
    store = dist.FileStore(str(work / "world-all"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=600))
    try:
        found = receive_rounds(work, Path(settings["disk"]), parameters, world_size, settings["slow_rounds"])
    finally:
        dist.destroy_process_group()
    return found | served


def make_receiver(work: Path, index: int) -> Any:
    import msgspec
    import torch

    from flowrl.weights.collective.giver import Terms
    from flowrl.weights.collective.receiver import Receiver

    receiver = Receiver(
        f"engine-{index}",
        NUM_RANKS,
        bind=f"ipc://{work}/receiver-{index}",
        directory=work,
        address="",
        bucket_bytes=256 << 20,
        terms=Terms(torch.device("cpu"), "", 120.0),
    )
    (work / f"news-{index}.new").write_bytes(msgspec.json.encode(receiver.news))
    (work / f"news-{index}.new").rename(work / f"news-{index}.json")
    return receiver


def receive_rounds(work: Path, disk: Path, parameters: Any, world_size: int, rounds: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    from transformers import AutoModelForCausalLM

    receivers = dist.new_group([0, *range(NUM_RANKS, world_size)])
    buffers = {name: torch.empty_like(tensor) for name, tensor in parameters.items()}
    found: dict[str, Any] = {"gather": [], "directory": []}
    for way in found:
        for version in range(rounds):
            dist.barrier()
            if way == "gather":
                for name, tensor in parameters.items():
                    dist.broadcast(buffers[name], 0, group=receivers)
                    tensor.copy_(buffers[name])
            else:
                dist.barrier()
                fresh = AutoModelForCausalLM.from_pretrained(disk / f"v{version}", dtype=torch.bfloat16)
                for name, tensor in fresh.named_parameters():
                    parameters[name].copy_(tensor)
            found[way].append(time.monotonic())
            dist.barrier()
    return found


if __name__ == "__main__":
    role, number = sys.argv[1].split(":")
    run = {"rank": run_rank, "engine": run_engine}[role]
    print(json.dumps(run(int(number), json.loads(sys.argv[2]))))
