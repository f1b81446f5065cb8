"""What the controllers cost by themselves: messages and CPU time a step, with stages that only sleep.

    python benchmarks/controllers.py [--nodes 1,2,4,8,16] [--rows 64,256,1024] [--steps 60] [--out RESULT.json]

All controllers run on this machine under torchrun, each with a queue shard, a producer, a stage that sleeps, and its
part of the consumer that closes updates. First the number of nodes grows at one batch size, then the batch at four
nodes. A message is a call of torch RPC that is no heartbeat, counted where it is sent; words between a controller and
its own workers are counted apart. The clock of a published version starts when the consumer announces it and stops when
the producer of each node hears it. Memory is the controller's own process, at the end.
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
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from controllers import node as node_module
from controllers import peers as peers_module
from controllers.context import WorkerContext
from controllers.graph import Graph
from controllers.node import NodeController
from controllers.placement import Pool, plan
from controllers.settings import ControllerSettings, Observers, QueueSettings
from controllers.stage import Kind, Stage, Unit
from controllers.supervisor import Limits
from controllers.topology import Topology
from transfer_queue.client import QueueClient
from transfer_queue.rows import Column, RowKey, Rows

ROOT = Path(__file__).resolve().parents[1]
HERE = str(Path(__file__).resolve())
LAUNCHER = str(Path(__file__).resolve().with_name("controllers.py"))
GROUP_ROWS = 8
WARM_UP = 10
SLEEP_S = 0.002
START_S = 600.0
STEADY_ROWS = 256
STEADY_NODES = 4


# What the workers do.


def source(context: WorkerContext) -> None:
    """Fills what the clock admits with rows of one number, and notes when it hears of each version."""
    heard: list[float] = []
    version = 0

    def hear(payload: dict[str, Any]) -> None:
        nonlocal version
        version = payload["version"]
        heard.append(time.time() - payload["t"])

    context.on("published", hear)
    with QueueClient(context.queue_endpoints, secret=context.queue_secret) as queue:
        context.ready()
        while not context.stopping.is_set():
            queue.announce(context.name, version)
            with context.waiting_for("room in the queue"):
                reservations = queue.reserve(context.name, 8, GROUP_ROWS, wait_s=0.5)
            time.sleep(SLEEP_S)
            for reservation in reservations:
                columns = {"number": Column.scalars([key.index for key in reservation.keys], "int64")}
                queue.put(reservation.keys, columns, versions=[reservation.version] * GROUP_ROWS)
    (context.run_dir / f"heard-{context.node}.json").write_text(json.dumps(heard))


class Sleep:
    def __init__(self, context: WorkerContext, settings: Mapping[str, Any]) -> None:
        """Needs nothing."""

    def process(self, rows: Rows) -> dict[str, Column]:
        time.sleep(SLEEP_S)
        return {"slept": Column.scalars(np.zeros(len(rows), dtype=np.uint8))}


def sink(context: WorkerContext) -> None:
    """Every node's part of each update; the update is over when the queue says so."""
    batch_rows, steps = context.payload["batch_rows"], context.payload["steps"]
    with QueueClient(context.queue_endpoints, secret=context.queue_secret) as queue:
        context.ready()
        for update in range(steps):
            keys: list[RowKey] = []
            is_closed = False
            while not is_closed:
                with context.waiting_for(f"rows for update {update}"):
                    share = max(GROUP_ROWS, batch_rows // (2 * context.world_size))
                    taken = queue.take("sink", max_rows=share, update=update, wait_s=5.0)
                if context.stopping.is_set():
                    return
                is_closed = taken.closed
                keys += taken.rows.keys
            queue.commit(0, update, keys)
            if context.rank == 0:
                context.announce("published", {"version": update + 1, "t": time.time()})
    if context.rank == 0:
        context.announce("run/finished", {})
    context.stopping.wait()


# One node, in the process that torchrun starts.


def run_node(folder: Path, rows: int, steps: int) -> int:
    topology = Topology.from_environment()
    sent: Counter[str] = Counter()
    count_messages(sent)
    marks: list[dict[str, Any]] = []
    me = psutil.Process()

    def mark(topic: str, payload: dict[str, Any]) -> None:
        if topic == "published" and payload["version"] in (WARM_UP, steps):
            marks.append({"cpu_s": sum(me.cpu_times()[:2]), "t": time.time(), "sent": dict(sent)})

    graph = Graph.of([
        Stage(name="source", run=f"{HERE}:source", kind=Kind.DRIVER, unit=Unit.GROUP, writes=("number",)),
        Stage(name="sleep", run=f"{HERE}:Sleep", reads=("number",), writes=("slept",)),
        Stage(
            name="sink", run=f"{HERE}:sink", kind=Kind.DRIVER, unit=Unit.BATCH, reads=("number", "slept"),
            settings={"batch_rows": rows, "steps": steps},
        ),
    ])  # fmt: skip
    settings = ControllerSettings(
        run_dir=folder,
        queue=QueueSettings(batch_rows=rows, max_staleness=1, byte_limit=64 << 20),
        limits=Limits(start_s=START_S),
        start_s=START_S,
        peer_s=60.0,
    )
    plans = plan(graph, [Pool(name="cpu")], topology.num_nodes)

    def say_end(code: int, reason: str) -> None:
        if code:
            print(f"node {topology.node}: {reason}", flush=True)

    observers = Observers(on_announcement=mark, on_end=say_end)
    code = NodeController(topology, graph, plans, settings, None, observers).run()
    memory = me.memory_full_info()
    result = {"marks": marks, "rss": memory.rss, "uss": memory.uss}
    (folder / f"node-{topology.node}.json").write_text(json.dumps(result))
    return code


def count_messages(sent: Counter[str]) -> None:
    """Wraps the two places through which every word of a controller goes."""
    ask = peers_module.TorchPeers.ask
    hear = node_module.decode_to_controller

    def counted_ask(self: Any, node: int, handler: str, payload: bytes, timeout_s: float) -> Any:
        if node != self.node and handler != peers_module._PING:
            sent["rpc"] += 1
            sent[f"rpc {handler}"] += 1
            sent["rpc bytes"] += len(payload)
        return ask(self, node, handler, payload, timeout_s)

    def counted_hear(body: bytes) -> Any:
        sent["own workers"] += 1
        return hear(body)

    peers_module.TorchPeers.ask = counted_ask  # type: ignore[method-assign]
    node_module.decode_to_controller = counted_hear


# The whole benchmark.


def measure(nodes: int, rows: int, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        arguments = [LAUNCHER, "--as-a-node", work, "--rows", str(rows), "--steps", str(steps)]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nodes}"]
        command = [*launcher, *arguments] if nodes > 1 else [sys.executable, *arguments]
        began = time.monotonic()
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(
                f"{nodes} nodes: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            )
        found = [json.loads((Path(work) / f"node-{node}.json").read_text()) for node in range(nodes)]
        heard = [json.loads((Path(work) / f"heard-{node}.json").read_text())[WARM_UP:] for node in range(nodes)]
    result = summarise(found, heard, nodes, rows, steps - WARM_UP) | {"wall_s": round(time.monotonic() - began, 1)}
    print(json.dumps(result), flush=True)
    return result


def summarise(
    found: list[dict[str, Any]], heard: list[list[float]], nodes: int, rows: int, steps: int
) -> dict[str, Any]:
    def grown(node: dict[str, Any], name: str) -> float:
        first, last = node["marks"]
        return (last["sent"].get(name, 0) - first["sent"].get(name, 0)) / steps

    cpu_ms = [1000 * (node["marks"][1]["cpu_s"] - node["marks"][0]["cpu_s"]) / steps for node in found]
    slowest = [max(each) for each in zip(*heard, strict=False)] or [0.0]
    handlers = sorted({name for node in found for name in node["marks"][1]["sent"] if name.startswith("rpc ")})
    return {
        "nodes": nodes,
        "rows": rows,
        "step_ms": round(1000 * (found[0]["marks"][1]["t"] - found[0]["marks"][0]["t"]) / steps, 2),
        "rpc_a_step": round(sum(grown(node, "rpc") for node in found), 2),
        "rpc_bytes_a_step": round(sum(grown(node, "rpc bytes") for node in found)),
        "rpc_by_kind": {name: round(sum(grown(node, name) for node in found), 2) for name in handlers},
        "own_workers_a_step": round(sum(grown(node, "own workers") for node in found), 2),
        "cpu_ms_a_step_of_a_controller": round(statistics.mean(cpu_ms), 3),
        "cpu_ms_a_step_of_node_0": round(cpu_ms[0], 3),
        "rss_mb": round(max(node["rss"] for node in found) / 2**20, 1),
        "uss_mb": round(statistics.mean(node["uss"] for node in found) / 2**20, 1),
        "publish_to_every_node_ms": {
            "median": round(1000 * statistics.median(slowest), 2),
            "p95": round(1000 * float(np.quantile(slowest, 0.95)), 2),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", default="1,2,4,8,16")
    parser.add_argument("--rows", default="64,256,1024", help="of an update")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, help="where the result goes as JSON")
    parser.add_argument("--as-a-node", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.as_a_node is not None:
        return run_node(given.as_a_node, int(given.rows), given.steps)
    by_nodes = [measure(int(nodes), STEADY_ROWS, given.steps) for nodes in given.nodes.split(",")]
    by_rows = [measure(STEADY_NODES, int(rows), given.steps) for rows in given.rows.split(",")]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "load_before": os.getloadavg()[0],
        "by_nodes": by_nodes,
        "by_rows": by_rows,
        "messages_16_nodes_over_4": ratio(by_nodes, "nodes", 4, 16),
        "messages_4_times_the_rows_over_1": ratio(by_rows, "rows", 256, 1024),
    }
    print("\n" + table(by_nodes + by_rows))
    print(json.dumps({name: value for name, value in result.items() if not name.startswith("by_")}, indent=2))
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def ratio(measured: list[dict[str, Any]], field: str, low: int, high: int) -> float | None:
    """RPC calls a step at `high` over those at `low`; None where one of them was not measured."""
    found = {each[field]: each["rpc_a_step"] for each in measured}
    return round(found[high] / found[low], 2) if found.get(low) and found.get(high) else None


def table(measured: list[dict[str, Any]]) -> str:
    columns = (
        "nodes", "rows", "step_ms", "rpc_a_step", "own_workers_a_step", "cpu_ms_a_step_of_a_controller",
        "cpu_ms_a_step_of_node_0", "rss_mb", "uss_mb",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " | publish ms (median, p95) |", "|---" * (len(columns) + 1) + "|"]
    for each in measured:
        publish = each["publish_to_every_node_ms"]
        cells = [str(each[name]) for name in columns]
        lines.append("| " + " | ".join(cells) + f" | {publish['median']}, {publish['p95']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
