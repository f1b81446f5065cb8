"""From the end of the optimizer step to the last engine that serves the new version, beside three other ways.

    python benchmarks/weights.py [--sizes 10 100 500] [--engines 1 2] [--rounds 7] [--slow-rounds 3] [--out RESULT.json]

Two trainer ranks (gloo, FSDP2, float32 masters) and one or two processes with an embedded engine (bfloat16), all on
this machine, random weights in the shape of Qwen3. Each round changes the weights, meets, and then publishes; the clock
runs from there, in the last rank to get there, to the last engine's `load_weights` having returned. An engine is told
by one ZeroMQ message. For each size and number of engines, in the same processes and one after the other:

  flowrl     sharded writing into shared memory, one rename, loading in place
  collective `weights.transport: collective` over gloo: the same shards sent into the engine's parameters
  gather     (a) every tensor gathered to rank 0, cast, broadcast with torch.distributed, copied into the engine's model
  directory  (b) every tensor gathered to rank 0, cast, saved as a checkpoint directory, loaded by the engines from it
  bound      (c) the version's bytes once, copied by one thread from memory to memory

pause: how long `publish` takes on the slower rank, beside one cast-and-copy of that rank's shard into memory that is
warm, on both ranks at once. Medians over the rounds after two that warm up (after one, of the two slow ways).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NUM_RANKS = 2
WARM_UPS = 2
SLOW_WARM_UPS = 1
WAYS = ("flowrl", "collective", "gather", "directory")
SHAPES = {  # millions of parameters: hidden size, layers, intermediate size; a vocabulary of 8192, tied
    10: (256, 8, 1024),
    100: (768, 13, 2304),
    500: (1536, 18, 4608),
}


def main() -> None:
    given = parse()
    results = []
    for size in given.sizes:
        for engines in given.engines:
            results.append(measure(size, engines, given))
            print(json.dumps(results[-1]), flush=True)
            if given.out is not None:  # as far as it has got
                given.out.write_text(json.dumps(report(results), indent=2) + "\n")
    print(table(results))


def report(results: list[dict[str, Any]]) -> dict[str, Any]:
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    return {"date": time.strftime("%Y-%m-%d"), "machine": machine, "results": results}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 500], choices=list(SHAPES))
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slow-rounds", type=int, default=3, help="of gather and directory")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where (b) saves")
    parser.add_argument("--out", type=Path, help="where the result goes as JSON")
    return parser.parse_args()


def measure(size: int, engines: int, given: argparse.Namespace) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm", prefix="flowrl-bench-") as memory,
        tempfile.TemporaryDirectory(dir=given.scratch, prefix="flowrl-bench-") as disk,
    ):
        work = Path(memory)
        make_model(work / "model", size)
        roles = [f"rank:{rank}" for rank in range(NUM_RANKS)] + [f"engine:{index}" for index in range(engines)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
        environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        command = [sys.executable, "-P", __file__, "--role"]
        settings = json.dumps(
            {
                "work": memory,
                "disk": disk,
                "engines": engines,
                "rounds": given.rounds + WARM_UPS,
                "slow_rounds": given.slow_rounds + SLOW_WARM_UPS,
            }
        )
        processes = [
            subprocess.Popen([*command, role, settings], env=environment, stdout=subprocess.PIPE, text=True)
            for role in roles
        ]
        outputs = [process.communicate(timeout=1800)[0] for process in processes]
        for role, process in zip(roles, processes, strict=True):
            if process.returncode:
                raise SystemExit(f"{role} failed with {process.returncode}")
        return summary(size, engines, [json.loads(output.splitlines()[-1]) for output in outputs])


def summary(size: int, engines: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    ranks, served = found[:NUM_RANKS], found[NUM_RANKS:]
    size_bytes = ranks[0]["bytes"]
    result: dict[str, Any] = {"parameters_m": size, "engines": engines, "bytes": size_bytes}
    for way in WAYS:
        times = []
        for round_ in range(len(ranks[0][way])):
            begin = max(rank[way][round_] for rank in ranks)
            times.append(max(engine[way][round_] for engine in served) - begin)
        result[f"{way}_ms"] = 1e3 * median_after_warming_up(way, times)
    result["bound_ms"] = 1e3 * ranks[0]["memcpy"]
    for measured in ("pause", "collective_pause", "cast"):
        rounds = [max(both) for both in zip(*(rank[measured] for rank in ranks), strict=True)]
        result[f"{measured}_ms"] = 1e3 * statistics.median(rounds[WARM_UPS:])
    result["against_gather"] = result["gather_ms"] / result["flowrl_ms"]
    result["against_directory"] = result["directory_ms"] / result["flowrl_ms"]
    result["over_bound"] = result["flowrl_ms"] / result["bound_ms"]
    result["pause_over_cast"] = result["pause_ms"] / result["cast_ms"]
    result |= {f"{way}_moved": number * size_bytes for way, number in moved(engines).items()}
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in result.items()}


def median_after_warming_up(way: str, times: list[float]) -> float:
    return statistics.median(times[SLOW_WARM_UPS if way in ("gather", "directory") else WARM_UPS :])


def moved(engines: int) -> dict[str, int]:
    """From process to process, in versions: a rank's float32 half that the other gathers is one whole version."""
    return {"flowrl": 1 + engines, "collective": engines, "gather": 2 + engines, "directory": 2 + 1 + engines}


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| M parameters | engines | MB | flowrl ms | collective ms | gather ms | directory ms | bound ms | × gather "
        "| × directory | over bound | pause ms | collective's | cast ms | over cast | MB moved |",
        "|" + "---|" * 16,
    ]
    for row in results:
        everything = " / ".join(f"{row[f'{way}_moved'] / 1e6:.0f}" for way in WAYS)
        lines.append(
            f"| {row['parameters_m']} | {row['engines']} | {row['bytes'] / 1e6:.0f} | {row['flowrl_ms']:.1f} "
            f"| {row['collective_ms']:.1f} | {row['gather_ms']:.0f} | {row['directory_ms']:.0f} "
            f"| {row['bound_ms']:.1f} | {row['against_gather']:.1f} | {row['against_directory']:.1f} "
            f"| {row['over_bound']:.2f} | {row['pause_ms']:.1f} | {row['collective_pause_ms']:.1f} "
            f"| {row['cast_ms']:.1f} | {row['pause_over_cast']:.2f} | {everything} |"
        )
    return "\n".join(lines)


def make_model(path: Path, size: int) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, layers, intermediate = SHAPES[size]
    config = Qwen3Config(
        vocab_size=8192,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        intermediate_size=intermediate,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)


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
            publisher.publish(version)
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

    torch.set_num_threads(1)
    work, rounds = Path(settings["work"]), settings["rounds"]
    context = zmq.Context()
    news = context.socket(zmq.PULL)
    news.bind(f"ipc://{work}/engine-{index}")

    async def follow() -> tuple[dict[str, list[float]], dict[str, torch.Tensor]]:
        engine = EmbeddedEngine(dtype="bfloat16", max_batch=1, max_model_tokens=64, threads=1)
        await engine.start(work / "model", 0)
        served: dict[str, list[float]] = {"flowrl": [], "collective": []}
        receiver = make_receiver(work, index)
        for number in range(2 * rounds):
            if number == rounds:
                receiver.meet(lambda: False)
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
    if sys.argv[1:2] == ["--role"]:
        role, number = sys.argv[2].split(":")
        run = {"rank": run_rank, "engine": run_engine}[role]
        print(json.dumps(run(int(number), json.loads(sys.argv[3]))))
    else:
        main()
