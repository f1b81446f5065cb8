"""A node whose engines are slow holds nobody back: throughput beside the sum of what the engines can do.

    python benchmarks/slow_node.py [--slowdown 4] [--updates 40] [--out RESULT.json]

Two virtual nodes under torchrun, each with a controller, a shard of the queue, a rollout worker and a trainer rank, all
of them the real ones; only the engines are not: theirs sleep, so that what they can do is known, and that two cores are
enough for everything else. A response takes one second on node 0 and --slowdown seconds on node 1. The run is bound by
rollout, and by nothing else: training takes a fraction of the time, and the bound on staleness leaves a slow response
the updates that it spans. Measured from --settle updates on: rows trained or rows sampled a second, whichever is less.
Then the same with no node slowed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve()
SLOWDOWN = "SLOW_NODE_SLOWDOWN"
RESPONSE_S = 1.0
TOKENS = 8
GROUP = 4
PLACES = 64
"""Samples that an engine works on at once."""
BATCH_GROUPS = 32
BOUND = 3


def rollout(context: Any) -> None:
    """The rollout stage with another engine, in the worker's process."""
    from flowrl.stages import rollout as stage

    slowdown = float(os.environ[SLOWDOWN]) if context.node else 1.0
    stage.make_engine = lambda *_: SleepingEngine(RESPONSE_S * slowdown)  # type: ignore[attr-defined,assignment]
    stage.main(context)


class SleepingEngine:
    """Every response takes as long, up to PLACES at once; its tokens are those of the weights that it began with."""

    def __init__(self, response_s: float) -> None:
        from flowrl.rollout.engine import Capabilities

        self.version = -1
        self.capabilities = Capabilities(max_model_tokens=1 << 20)
        self._response_s = response_s
        self._places = asyncio.Semaphore(PLACES)

    async def start(self, path: Path, version: int) -> None:
        self.version = version

    async def generate(self, request: Any) -> Any:
        from flowrl.rollout.engine import FinishReason, Generation

        async with self._places:
            version = self.version
            await asyncio.sleep(self._response_s)
        draw = np.random.default_rng(request.sampling.seed)
        return Generation(
            tokens=draw.integers(3, 20, TOKENS).astype(np.int32),
            logprobs=np.full(TOKENS, -3.0, np.float32),
            versions=np.full(TOKENS, version, np.int32),
            finish_reason=FinishReason.LENGTH,
        )

    async def load_weights(self, path: Path, version: int, mode: Any = None) -> None:
        self.version = version

    async def abort(self, request_id: str | None = None) -> None:
        """Whoever waits is cancelled with its stage."""

    async def close(self) -> None:
        """Nothing is open."""


def share_of_vowels(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None) -> float:
    return sum(letter in "aeiou" for letter in solution_str) / max(1, len(solution_str))


def run_node(work: Path, updates: int) -> int:
    """One node, in the process that torchrun starts: `flowrl run`, but for the rollout worker."""
    from controllers.node import NodeController
    from controllers.topology import Topology
    from flowrl import config, pipeline
    from flowrl.cli.run import ensure_model, open_directory

    topology = Topology.from_environment()
    recipe = config.load(
        ROOT / "recipes" / "quickstart.yaml",
        [
            "run.name=slow_node", f"run.dir={work}/runs", f"model.path={work}/model", f"run.session_dir={work}/s",
            "data.size=20000", "data.held_out=0", "data.dev=0", "eval=null", "warm_start=null", "reward.name=null",
            f"reward.path={HERE}:share_of_vowels", f"staleness.max={BOUND}", f"train.batch_groups={BATCH_GROUPS}",
            f"rollout.group_size={GROUP}", f"rollout.concurrency={PLACES // GROUP}", f"train.steps={updates}",
            "weights.check_first_sync=false", "run.record=false", "algorithm.skip_tied=false",
        ],
    )  # fmt: skip
    built = pipeline.build(recipe, topology.num_nodes)
    directory, recipe_path, life = open_directory(recipe, topology.node, False)
    ensure_model(Path(recipe.model.path), recipe_path)
    workers = pipeline.worker_settings(built, recipe_path)
    workers["rollout"]["target"] = f"{HERE}:rollout"
    settings = pipeline.controller_settings(built, directory, life)
    return NodeController(topology, built.graph, built.workers, settings, workers).run()


def measure(slowdown: float, updates: int, settle: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(HERE),
            "--as-a-node", folder, "--updates", str(updates),
        ]  # fmt: skip
        environment = {**os.environ, SLOWDOWN: str(slowdown), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        return summarise(Path(folder) / "runs" / "slow_node", slowdown, settle)


def summarise(run: Path, slowdown: float, settle: int) -> dict[str, Any]:
    from flowrl.report.events import read_events
    from flowrl.report.staleness_check import check_run

    published: dict[int, float] = {}
    sampled: list[tuple[float, int]] = []
    trained: Counter[int] = Counter()
    for event in read_events(run / "events.jsonl"):
        if event.kind == "published" and event.version is not None:
            published[event.version] = event.t
        elif event.kind == "sampled":
            sampled.append((event.t, event.node))
        elif event.kind == "trained" and event.update is not None:
            trained[event.update] += 1
    first, last = settle, max(published)
    seconds = published[last] - published[first]
    rows = sum(trained[update] for update in range(first, last))
    by_node = Counter(node for t, node in sampled if published[first] <= t <= published[last])
    can_do = [PLACES / RESPONSE_S, PLACES / (RESPONSE_S * slowdown)]
    return {
        "slowdown": slowdown,
        "rows_per_s": round(rows / seconds, 2),
        "engines_can_do": sum(can_do),
        "ratio": round(min(rows, by_node.total()) / seconds / sum(can_do), 3),
        "sampled_per_s_by_node": [round(by_node[node] / seconds, 2) for node in range(2)],
        "can_do_by_node": can_do,
        "updates": last - first,
        "seconds": round(seconds, 1),
        "is_clean": check_run(run).is_clean,
    }


def main() -> int:
    sys.path[0] = str(ROOT)  # some benchmarks in this folder have the names of packages
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slowdown", type=float, default=4.0)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--settle", type=int, default=10, help="updates that are not measured (10)")
    parser.add_argument("--out", type=Path, help="where the result goes as JSON")
    parser.add_argument("--as-a-node", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.as_a_node is not None:
        return run_node(given.as_a_node, given.updates)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left behind
    found = [measure(slowdown, given.updates, given.settle) for slowdown in (given.slowdown, 1.0)]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "load_before": os.getloadavg()[0],
        "slowed": found[0],
        "even": found[1],
    }
    print(json.dumps(result, indent=2))
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if found[0]["ratio"] >= 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
