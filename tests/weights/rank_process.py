"""One trainer rank: `python -m tests.weights.rank_process CASE RANK SIZE MODEL_DIR OUT_DIR`.

Ranks meet at a file; FSDP2 shards; rank 0 has the store. What each case leaves in OUT_DIR, the test judges.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flowrl.weights.collective.giver import Terms
from flowrl.weights.collective.group import Group
from flowrl.weights.collective.writer import Collective
from flowrl.weights.publish import Publisher
from flowrl.weights.store import WeightStore
from tests.weights.versions import WORDS

NUM_VERSIONS = 6


class Layer(nn.Module):
    """Rows that divide unevenly, fewer rows than ranks, one row."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.zeros(7, 5))
        self.norm = nn.Parameter(torch.zeros(4))
        self.one = nn.Parameter(torch.zeros(1, 3))


class Model(nn.Module):
    """Two layers and embeddings that are tied, sharded as a language model is. Starts sooner than transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 3)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(3, 11, bias=False)
        self.head.weight = self.embedding.weight


def sharded(model_dir: Path, size: int) -> nn.Module:
    model = Model()
    model.load_state_dict(load_file(model_dir / "model.safetensors"), strict=False)
    mesh = init_device_mesh("cpu", (size,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def publisher_of(lm: nn.Module, rank: int, model_dir: Path, out: Path, is_pooled: bool = True) -> Publisher:
    store = WeightStore(out / "weights", 2) if rank == 0 else None
    return Publisher(lm, model_dir, store, "bfloat16", is_pooled=is_pooled)


def equal_case(rank: int, size: int, model_dir: Path, out: Path) -> None:
    """Versions, pooled and not, beside the gathered weights."""
    lm = sharded(model_dir, size)
    for is_pooled in (True, False):
        publisher = publisher_of(lm, rank, model_dir, out / str(is_pooled), is_pooled)
        if is_pooled:
            publisher.check_names()
        for version in range(NUM_VERSIONS):
            with torch.no_grad():
                for parameter in lm.parameters():
                    parameter.mul_(1.5)
            publisher.publish(version)
        publisher.close()
        state = {name: tensor.to(torch.bfloat16) for name, tensor in publisher.full_state().items()}
        if rank == 0:
            save_file(state, out / str(is_pooled) / "gathered.safetensors")


def failure_case(rank: int, size: int, model_dir: Path, out: Path) -> None:
    """The last rank cannot write version 1; version 2 goes well again."""
    publisher = publisher_of(sharded(model_dir, size), rank, model_dir, out)
    publisher.publish(0)
    fail_at_one(publisher, rank, size, out)


def fail_at_one(publisher: Publisher, rank: int, size: int, out: Path) -> None:
    """Version 1, and then 2."""
    writer = publisher._writer
    assert writer is not None
    write = writer.write
    if rank == size - 1:
        writer.write = fail  # type: ignore[method-assign]
    try:
        publisher.publish(1)
    except (OSError, RuntimeError) as error:
        (out / f"error-{rank}").write_text(str(error))
    (out / f"after-{rank}").write_text(str([*out.glob("weights*/v*1"), *out.glob("weights*/v*2")]))
    dist.barrier()
    writer.write = write  # type: ignore[method-assign]
    publisher.publish(2)
    publisher.close()


def told_case(rank: int, size: int, model_dir: Path, out: Path) -> None:
    """The last rank cannot write version 1, and nobody waits for it: `check` tells, then `begin`, and only once."""
    publisher = publisher_of(sharded(model_dir, size), rank, model_dir, out)
    publisher.publish(0)
    publisher.check()
    writer = publisher._writer
    assert writer is not None
    write = writer.write
    if rank == size - 1:
        writer.write = fail  # type: ignore[method-assign]
    publisher.begin(1)
    deadline = time.monotonic() + 30
    told = ""
    while not told and time.monotonic() < deadline:
        try:
            publisher.check()
        except (OSError, RuntimeError) as error:
            told = str(error)
    writer.write = write  # type: ignore[method-assign]
    try:
        publisher.begin(2)
    except (OSError, RuntimeError) as error:
        (out / f"error-{rank}").write_text(f"{told} | {error}")
    publisher.check()
    publisher.begin(2)
    publisher.close()


def fail(tensors: object) -> None:
    raise OSError("the memory of this rank is broken")


def ahead_case(rank: int, size: int, model_dir: Path, out: Path) -> None:
    """The first rank trains on while the last one has not yet written."""
    lm = sharded(model_dir, size)
    publisher = publisher_of(lm, rank, model_dir, out)
    publisher.publish(0)
    if rank == size - 1:
        while not (out / "trains-on").exists():
            time.sleep(0.005)
    publisher.begin(1)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(3)
    if rank == 0:
        (out / "seen").write_text(str(WeightStore(out / "weights", 2).versions()))
        (out / "trains-on").touch()
    publisher.close()


def nodes_case(rank: int, size: int, model_dir: Path, out: Path) -> None:
    """Two ranks a node. The very last cannot write version 1."""
    store = WeightStore(out / f"weights-{rank}", 2) if rank % 2 == 0 else None
    publisher = Publisher(sharded(model_dir, size), model_dir, store, "bfloat16")
    publisher.publish(0)
    fail_at_one(publisher, rank, size, out)


def killed_case(rank: int, size: int, model_dir: Path, out: Path, when: str = "write") -> None:
    """The last rank dies in the middle of version 1."""
    publisher = publisher_of(sharded(model_dir, size), rank, model_dir, out)
    publisher.publish(0)
    if rank == size - 1:
        setattr(publisher._writer, when, lambda *_: os._exit(9))
    try:
        publisher.publish(1)
    except RuntimeError as error:
        (out / f"error-{rank}").write_text(str(error))
    finally:
        publisher.close()  # its threads must not meet the interpreter's end


def nodes_killed_case(rank: int, size: int, model_dir: Path, out: Path) -> None:
    """Two ranks a node; the first of the second node dies when it has written its part."""
    store = WeightStore(out / f"weights-{rank}", 2) if rank % 2 == 0 else None
    publisher = Publisher(sharded(model_dir, size), model_dir, store, "bfloat16")
    publisher.publish(0)
    if rank == 2:
        publisher._writer.agree = lambda *_: os._exit(9)
    try:
        publisher.publish(1)
    except RuntimeError as error:
        (out / f"error-{rank}").write_text(str(error))
    finally:
        publisher.close()


def killed_late_case(rank: int, size: int, model_dir: Path, out: Path) -> None:
    """When it has written all of its part, and has told nobody yet."""
    killed_case(rank, size, model_dir, out, "agree")


def differing_case(rank: int, size: int, model_dir: Path, out: Path) -> None:
    lm = sharded(model_dir, size)
    publisher = publisher_of(lm, rank, model_dir, out)
    if rank:
        publisher = Publisher(lm, model_dir, None, "float32")
    try:
        publisher.publish(0)
    except RuntimeError as error:
        (out / f"error-{rank}").write_text(str(error))


def engines_in(out: Path, meet: Callable[[dict[str, Any]], None]) -> None:
    """Calls `meet` for each file `engine-*.json` that appears, from a thread that lives as long as the process."""
    seen = set[Path]()

    def look() -> None:
        while True:
            for path in set(out.glob("engine-*.json")) - seen:
                seen.add(path)
                meet(json.loads(path.read_text()))
            time.sleep(0.01)

    threading.Thread(target=look, daemon=True).start()


def collective_case(rank: int, size: int, model_dir: Path, out: Path) -> None:
    """Publishes to engines without any file, a version whenever a file `go-N` appears; ends with `end`. BENDS: a rank
    whose bytes do not reach engines as they are."""
    lm = sharded(model_dir, size)
    if os.environ.get("BENDS") == str(rank):
        bend_what_is_sent()
    terms = Terms(torch.device("cpu"), "", float(os.environ.get("TIMEOUT_S", "20")))
    publisher = Publisher(
        lm,
        model_dir,
        None,
        "bfloat16",
        collective=Collective(terms, lambda meet: engines_in(out, meet)),
        on_published=lambda version, path: (out / f"published-{version}").touch(),
    )
    version = 0
    publisher.publish(version)
    while not (out / "end").exists():
        if not (out / f"go-{version + 1}").exists():
            time.sleep(0.005)
            continue
        version += 1
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.mul_(1.5)
        started = time.monotonic()
        publisher.publish(version)
        (out / f"pause-{version}-{rank}").write_text(str(time.monotonic() - started))
        state = {name: tensor.to(torch.bfloat16) for name, tensor in publisher.full_state().items()}
        if rank == 0:
            save_file(state, out / "gathered.new")
            (out / "gathered.new").rename(out / f"gathered-{version}.safetensors")
    publisher.close()


def bend_what_is_sent() -> None:
    """The first bit of each part, always the same way."""
    send = Group.send

    def bent(group: Group, tensor: torch.Tensor, to: int, who: str) -> None:
        other = tensor.clone()
        other.view(torch.uint8)[0] ^= 1
        send(group, other, to, who)

    Group.send = bent  # type: ignore[method-assign]


class Words(nn.Module):
    """Tensors that are full of one number, sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in WORDS.values()])


def race_case(rank: int, size: int, model_dir: Path, out: Path) -> None:
    """As many versions as RACES says, each full of its own number, while a reader maps them and the ranks train on."""
    words = Words()
    fully_shard(words, mesh=init_device_mesh("cpu", (size,)))
    store = WeightStore(out / "weights", 3) if rank == 0 else None
    publisher = Publisher(words, model_dir, store, "float32")
    shards = list(publisher._locals().values())
    for version in range(int(os.environ["RACES"]) + 1):
        for shard in shards:
            shard.fill_(float(version))
        publisher.begin(version)
    publisher.finish()
    if rank == 0:
        (out / "last").write_text(str(version))
    dist.barrier()
    publisher.close()


def main(case: str, rank: int, size: int, model_dir: Path, out: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(out / "meeting"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    try:
        globals()[f"{case}_case"](rank, size, model_dir, out)
    finally:
        dist.destroy_process_group()
        gc.collect()  # models refer to the group, whose threads must have ended before the interpreter does


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5]))
