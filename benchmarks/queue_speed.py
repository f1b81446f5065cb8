"""The queue beside a bare ZeroMQ broker, memcpy and PyPI's TransferQueue, on the same bytes, in one run.

    python benchmarks/transfer_queue.py [--peer-python PYTHON] [--only throughput,latency,…] [--out RESULT.json]

The workload: batches of 256 rows with tokens int64, log-probs float32 and mask int64 of length 1024 (5.2 MB), from one
process to another. The broker is a ROUTER that holds frames and hands them out, nothing else: what a queue over sockets
can reach at best. PYTHON is an interpreter with TransferQueue==0.1.11 installed (it cannot share an environment with
us). Run it with nothing else on the machine. Ratios above 1 mean that we are faster.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing as mp
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from transfer_queue import (
    Accounts,
    Column,
    ConsumerSpec,
    Keys,
    LocalClock,
    QueueClient,
    QueueConfig,
    QueueServer,
)
from transfer_queue.spans import Span

ROWS, LENGTH, BATCHES, ROUNDS = 256, 1024, 1000, 5
HELD_BATCHES = 12
"""End to end, the most that the queue and the bounded broker hold before they keep the producer waiting."""
RESERVED_BATCHES = 3
"""What our producer reserves at once on one node, as one does that works on many groups side by side. Over TCP it is
one batch, which is faster there."""
GROUP_SIZE = 8
ROW_BYTES = LENGTH * (8 + 4 + 8)
FAR = 10**9
Columns = dict[str, Column]
Figures = dict[str, Any]


def arrays(rows: int = ROWS, length: int = LENGTH, is_wide: bool = False) -> dict[str, np.ndarray]:
    """is_wide: integers of which none fits into a narrower type."""
    draw = np.random.default_rng(0)
    if is_wide:
        whole = (draw.integers(-(2**63), 2**63 - 1, (rows, length)) for _ in range(2))
        return {
            "tokens": next(whole),
            "logprobs": draw.standard_normal((rows, length), np.float32),
            "mask": next(whole),
        }
    return {
        "tokens": draw.integers(0, 150_000, (rows, length), dtype=np.int64),
        "logprobs": draw.standard_normal((rows, length), dtype=np.float32),
        "mask": np.ones((rows, length), dtype=np.int64),
    }


def columns(rows: int = ROWS, length: int = LENGTH, is_wide: bool = False) -> Columns:
    offsets = np.arange(rows + 1, dtype=np.int64) * length
    return {name: Column(array.reshape(-1), offsets) for name, array in arrays(rows, length, is_wide).items()}


# Processes


def serve(
    names: tuple[str, ...], endpoint: str, ready: Any, shards: int = 1, index: int = 0, byte_limit: int = 2 << 30
) -> None:
    """A shard of ours, until it is killed or its parent ends."""
    consumers = {"train": ConsumerSpec(columns=names)}
    config = QueueConfig(
        endpoint=endpoint, consumers=consumers, byte_limit=byte_limit, first_group=index, group_stride=shards
    )
    server = QueueServer(config, LocalClock(Accounts(1, FAR)))
    ready.send(server.endpoint)
    server.serve(ready)
    server.close()


def broker(endpoint: str, ready: Any) -> None:
    """Holds frames and gives them back, first in, first out."""
    _hold(endpoint, ready, BATCHES)


def _bounded_broker(endpoint: str, ready: Any) -> None:
    """As our shard's byte limit, it keeps a producer waiting that is far ahead."""
    _hold(endpoint, ready, HELD_BATCHES)


def _hold(endpoint: str, ready: Any, max_batches: int) -> None:
    router = zmq.Context().socket(zmq.ROUTER)
    router.bind(endpoint)
    ready.send(router.getsockopt_string(zmq.LAST_ENDPOINT))
    held: list[list[zmq.Frame]] = []
    waiting: list[bytes] = []
    unanswered: list[bytes] = []
    while True:
        peer, verb, *frames = router.recv_multipart(copy=False)
        if verb.bytes == b"put":
            held.append(frames)
            unanswered.append(peer.bytes)
        else:
            waiting.append(peer.bytes)
        while held and waiting:
            router.send_multipart([waiting.pop(0), *held.pop(0)], copy=False)
        while unanswered and len(held) < max_batches:
            router.send_multipart([unanswered.pop(0), b"done"])


@contextmanager
def process(target: Callable[..., None], *args: Any) -> Iterator[tuple[Any, str, int]]:
    """(its pipe, what it says first, its process id)."""
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=target, args=(*args, there), daemon=True)
    child.start()
    there.close()
    try:
        yield here, here.recv() if target in SERVERS else "", child.pid or 0
    finally:
        here.close()
        child.join(2)
        child.kill()
        child.join()


def _serve_default(names: tuple[str, ...], endpoint: str, ready: Any) -> None:
    serve(names, endpoint, ready)


def _serve_bounded(names: tuple[str, ...], endpoint: str, ready: Any) -> None:
    serve(names, endpoint, ready, byte_limit=HELD_BATCHES * ROWS * ROW_BYTES)


SERVERS = (broker, _bounded_broker, _serve_default, _serve_bounded)


def wait_for_end(pipe: Any) -> None:
    """Of the parent's interest: until then the sockets stay open."""
    with suppress(EOFError, ConnectionResetError):
        pipe.recv()


# What a producer and a consumer do


def produce_wide(endpoint: str, shares_memory: bool, batches: int, pipe: Any) -> None:
    produce(endpoint, shares_memory, batches, pipe, is_wide=True)


def produce(endpoint: str, shares_memory: bool, batches: int, pipe: Any, is_wide: bool = False) -> None:
    batch = columns(is_wide=is_wide)
    with QueueClient(endpoint, shares_memory=shares_memory) as client:
        client.announce("p", 0)
        pipe.recv()
        times = []
        reserved: list[Span] = []
        reserved_rows = ROWS * (RESERVED_BATCHES if shares_memory else 1)
        for _ in range(batches):
            started = time.perf_counter()
            if not reserved:
                reserved = list(reserve(client, reserved_rows).spans)
            mine, reserved = reserved[: ROWS // GROUP_SIZE], reserved[ROWS // GROUP_SIZE :]
            client.put_soon(Keys(mine), batch)
            times.append(time.perf_counter() - started)
        client.flush()
        pipe.send(times)
        wait_for_end(pipe)


def consume(endpoint: str, shares_memory: bool, batches: int, pipe: Any) -> None:
    with QueueClient(endpoint, shares_memory=shares_memory) as client:
        pipe.recv()
        got, done = 0, Keys([])
        while got < batches * ROWS:
            done = client.take("train", ROWS, done=done).rows.keys
            got += len(done)
        pipe.send(time.perf_counter())
        wait_for_end(pipe)


def produce_raw(endpoint: str, batches: int, pipe: Any) -> None:
    socket = zmq.Context().socket(zmq.DEALER)
    socket.connect(endpoint)
    frames = [array.reshape(-1).view(np.uint8).data for array in arrays().values()]
    pipe.recv()
    for _ in range(batches):
        socket.send_multipart([b"put", *frames], copy=False)
        socket.recv_multipart()
    pipe.send(0)
    wait_for_end(pipe)


def consume_raw(endpoint: str, batches: int, pipe: Any) -> None:
    socket = zmq.Context().socket(zmq.DEALER)
    socket.connect(endpoint)
    pipe.recv()
    for _ in range(batches):
        socket.send(b"get")
        frames = socket.recv_multipart(copy=False)
        assert sum(frame.buffer.nbytes for frame in frames) == ROWS * ROW_BYTES
    pipe.send(time.perf_counter())
    wait_for_end(pipe)


def reserve(client: QueueClient, rows: int, group_size: int = GROUP_SIZE) -> Keys:
    spans: list[Span] = []
    while len(spans) * group_size < rows:
        missing = rows // group_size - len(spans)
        spans += [group.span for group in client.reserve("p", missing, group_size, row_bytes=ROW_BYTES)]
    return Keys(spans)


def end_to_end(producer: Callable[..., None], consumer: Callable[..., None], *args: Any, batches: int) -> float:
    """MB/s from the first put to the last take, after a warm-up."""
    best = []
    for count in (10, batches):
        with process(producer, *args, count) as (put, _, _), process(consumer, *args, count) as (take, _, _):
            time.sleep(1.5)
            started = time.perf_counter()
            put.send(1)
            take.send(1)
            put.recv()
            best.append(count * ROWS * ROW_BYTES / 1e6 / (take.recv() - started))
    return best[-1]


# Figures


def throughput(results: Figures, directory: str, peer_python: str | None) -> None:
    """Medians of rounds in which all take turns, because what a machine can do changes from minute to minute."""
    for kind in ("ipc", "tcp"):
        rates: dict[str, list[float]] = {"broker": [], "bounded_broker": [], "ours": [], "ours_wide": []}
        for number, name in itertools.product(range(ROUNDS), rates):
            endpoint = f"ipc://{directory}/{name}{number}" if kind == "ipc" else "tcp://127.0.0.1:*"
            if name.startswith("ours"):
                near, producer = kind == "ipc", produce if name == "ours" else produce_wide
                with process(_serve_bounded, tuple(columns(1)), endpoint) as (_, address, _):
                    rates[name].append(end_to_end(producer, consume, address, near, batches=BATCHES))
            else:
                with process(broker if name == "broker" else _bounded_broker, endpoint) as (_, address, _):
                    rates[name].append(end_to_end(produce_raw, consume_raw, address, batches=BATCHES))
        for name, measured in rates.items():
            results[f"{name}_{kind}_MB_s"] = statistics.median(measured)
            results[f"{name}_{kind}_least"], results[f"{name}_{kind}_most"] = min(measured), max(measured)
        for ours, name in itertools.product(("ours", "ours_wide"), ("broker", "bounded_broker")):
            ratio(results, f"{ours}/{name}_{kind}", f"{ours}_{kind}_MB_s", f"{name}_{kind}_MB_s")
    if peer_python is not None:
        # From a folder of its own, and without our path: Ray's workers would find our `transfer_queue`.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        script = shutil.copy(Path(__file__).with_name("queue_speed_peer.py"), directory)
        ended = subprocess.run(
            [peer_python, script], capture_output=True, text=True, timeout=600, cwd=directory, env=environment
        )
        if ended.returncode:
            raise SystemExit(f"the peer failed:\n{ended.stderr[-3000:]}")
        results |= json.loads(ended.stdout.strip().splitlines()[-1])
        ratio(results, "ours/peer", "ours_ipc_MB_s", "peer_MB_s")


def local_take(results: Figures, directory: str) -> None:
    """Of what is ready, beside a copy of the same bytes into memory that is used again, neither of them in a cache."""
    pairs = [(np.ones(ROWS * ROW_BYTES, np.uint8), np.ones(ROWS * ROW_BYTES, np.uint8)) for _ in range(16)]
    turns = itertools.cycle(pairs)

    def copy() -> None:
        source, target = next(turns)
        np.copyto(target, source)

    results["memcpy_ms"] = 1e3 * median_s(copy, 160)
    with (
        process(_serve_default, tuple(columns(1)), f"ipc://{directory}/l") as (_, address, _),
        QueueClient(address) as client,
    ):
        client.announce("p", 0)
        batch = columns()
        takes, puts = [], []
        for _ in range(60):
            keys = reserve(client, ROWS)
            started = time.perf_counter()
            client.put(keys, batch)
            put = time.perf_counter()
            rows = client.take("train", ROWS).rows
            takes.append(time.perf_counter() - put)
            puts.append(put - started)
            client.ack("train", rows.keys)
    results["take_ms"], results["put_ms"] = 1e3 * statistics.median(takes), 1e3 * statistics.median(puts)
    results["take/memcpy"] = results["take_ms"] / results["memcpy_ms"]


def latency(results: Figures, directory: str) -> None:
    with (
        process(_serve_default, tuple(columns(1)), f"ipc://{directory}/g") as (_, address, _),
        QueueClient(address) as client,
    ):
        client.announce("p", 0)
        for rows in (1, 32, 256):
            times = []
            for _ in range(300 if rows == 1 else 60):
                client.put(reserve(client, rows, min(rows, GROUP_SIZE)), columns(rows))
                started = time.perf_counter()
                got = client.take("train", rows).rows
                times.append(time.perf_counter() - started)
                client.ack("train", got.keys)
            results[f"get_{rows}_p50_ms"] = 1e3 * statistics.median(times)
            results[f"get_{rows}_p95_ms"] = 1e3 * sorted(times)[int(0.95 * len(times))]


def stream(endpoint: str, rows: int, pipe: Any) -> None:
    """Row by row, as a rollout finishes them."""
    one = columns(1)
    with QueueClient(endpoint) as client:
        client.announce("p", 0)
        pipe.recv()
        for _ in range(rows // 64):
            for key in reserve(client, 64):
                client.put_soon([key], one)
        client.flush()
        pipe.send(0)
        wait_for_end(pipe)


def streaming(results: Figures, directory: str) -> None:
    rows = 20_480
    with (
        process(_serve_default, tuple(columns(1)), f"ipc://{directory}/s") as (_, address, _),
        process(stream, address, rows) as (pipe, _, _),
        QueueClient(address) as client,
    ):
        time.sleep(1.5)
        started = time.perf_counter()
        pipe.send(1)
        got = 0
        while got < rows:
            taken = client.take("train", 32).rows
            client.ack("train", taken.keys)
            got += len(taken)
        results["put_1_take_32_rows_s"] = rows / (time.perf_counter() - started)


def many_columns(results: Figures, directory: str) -> None:
    """The same bytes in 1 to 32 columns."""
    for count in (1, 2, 4, 8, 16, 32):
        names = tuple(f"c{index}" for index in range(count))
        length = ROWS * ROW_BYTES // ROWS // 8 // count
        offsets = np.arange(ROWS + 1, dtype=np.int64) * length
        batch = {name: Column(np.ones(ROWS * length), offsets) for name in names}
        with (
            process(_serve_default, names, f"ipc://{directory}/c{count}") as (_, address, _),
            QueueClient(address) as client,
        ):
            client.announce("p", 0)

            def once(client: QueueClient = client, batch: Columns = batch) -> None:
                client.put(reserve(client, ROWS), batch)
                client.ack("train", client.take("train", ROWS).rows.keys)

            results[f"columns_{count}_MB_s"] = ROWS * length * count * 8 / 1e6 / median_s(once, 300)
    rates = [results[f"columns_{count}_MB_s"] for count in (1, 2, 4, 8, 16, 32)]
    results["columns_slowest/fastest"] = min(rates) / max(rates)


def growth(results: Figures, directory: str) -> None:
    """Time of a take of 32 rows, with ever more rows in the ledger; and of a put and take with ever more clients."""
    tiny = {"x": Column.scalars(np.zeros(4096), "float32")}
    with (
        process(_serve_default, ("x",), f"ipc://{directory}/r") as (_, address, _),
        QueueClient(address, timeout_s=120) as client,
    ):
        client.announce("p", 0)
        total = 0
        for rows in (10**3, 10**4, 10**5, 10**6):
            while total < rows:
                groups = client.reserve("p", 512, 8)
                keys = [key for group in groups for key in group.keys]
                client.put(keys, {"x": tiny["x"].slice(0, len(keys))})
                total += len(keys)
            times = []
            for _ in range(60):
                started = time.perf_counter()
                got = client.take("train", 32).rows
                times.append(time.perf_counter() - started)
                client.ack("train", got.keys)
            results[f"take_32_of_{rows}_ms"] = 1e3 * statistics.median(times)
    for count in (1, 4, 16, 64):
        with process(_serve_default, tuple(columns(1)), f"ipc://{directory}/n{count}") as (_, address, _):
            clients = [QueueClient(address) for _ in range(count)]
            batch = columns(8)
            for client in clients:
                client.announce("p", 0)

            def turn(clients: list[QueueClient] = clients, batch: Columns = batch) -> None:
                for client in clients:
                    client.put(reserve(client, 8), batch)
                    client.ack("train", client.take("train", 8).rows.keys)

            results[f"clients_{count}_ms_each"] = 1e3 * median_s(turn, 20) / count
            for client in clients:
                client.close()


def memory(results: Figures, directory: str) -> None:
    """512 MB of live rows: what the shard and its segments take at most, and what comes back."""
    with (
        process(_serve_default, tuple(columns(1)), f"ipc://{directory}/m") as (_, address, pid),
        QueueClient(address) as client,
    ):
        client.announce("p", 0)
        batch, keys = columns(is_wide=True), []
        for _ in range(100):
            keys.append(reserve(client, ROWS))
            client.put(keys[-1], batch)
        (state,) = client.introspect().values()
        live = 100 * ROWS * ROW_BYTES
        resident = _private_bytes(pid) + state["segment_bytes"]
        results["live_MB"] = live / 1e6
        results["resident_MB"] = resident / 1e6
        results["resident_over_1.2_live_MB"] = (resident - 1.2 * live) / 1e6
        before = state["stored_bytes"]
        taken = client.take("train", ROWS).rows.keys
        client.ack("train", taken[:254])
        (state,) = client.introspect().values()
        results["freed_after_254_of_256"] = (before - state["stored_bytes"]) / (ROWS * ROW_BYTES)


def shards(results: Figures, directory: str) -> None:
    """One producer and one consumer over 1 to 8 shards, each in its process."""
    context = mp.get_context("spawn")
    for count in (1, 2, 4, 8):
        pipes, children = [], []
        for index in range(count):
            here, there = context.Pipe()
            name = f"ipc://{directory}/k{count}.{index}"
            args = (tuple(columns(1)), name, there, count, index)
            children.append(context.Process(target=serve, args=args, daemon=True))
            children[-1].start()
            there.close()
            pipes.append(here)
        addresses = [pipe.recv() for pipe in pipes]
        batch = columns(8)
        clients = [QueueClient([*addresses[at:], *addresses[:at]]) for at in range(count)]
        for client in clients:
            client.announce("p", 0)

        def turn(clients: list[QueueClient] = clients, batch: Columns = batch) -> None:
            for client in clients:
                client.put(reserve(client, 8), batch)
            for client in clients:
                client.ack("train", client.take("train", 8).rows.keys)

        results[f"shards_{count}_ms_each"] = 1e3 * median_s(turn, 30) / count
        for client in clients:
            client.close()
        for pipe, child in zip(pipes, children, strict=True):
            pipe.close()
            child.join(2)
            child.kill()


def _private_bytes(pid: int) -> int:
    """Of a process, without what it maps of files and shared memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    raise ValueError(f"/proc/{pid}/status has no RssAnon")


def median_s(action: Callable[[], object], times: int) -> float:
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def ratio(results: Figures, name: str, ours: str, theirs: str) -> None:
    results[name] = results[ours] / results[theirs]


PARTS = {
    "local_take": local_take, "latency": latency, "streaming": streaming, "many_columns": many_columns,
    "growth": growth, "memory": memory, "shards": shards,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="an interpreter with TransferQueue==0.1.11")
    parser.add_argument("--only", default="throughput," + ",".join(PARTS), help="parts, by comma")
    parser.add_argument("--out", type=Path, help="where the result goes as JSON")
    given = parser.parse_args()
    if given.peer_python is None:
        print("the peer is left out: no --peer-python was given", file=sys.stderr)
    results: Figures = {"cpus": os.cpu_count()}
    for part in given.only.split(","):
        with tempfile.TemporaryDirectory(prefix="tq-") as directory:
            before = set(results)
            if part == "throughput":
                throughput(results, directory, given.peer_python)
            else:
                PARTS[part](results, directory)
        for name in results:
            if name not in before:
                print(f"{name:32s} {results[name]:12.3f}", flush=True)
    results["peak_rss_of_this_process_MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    if given.out is not None:
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
