"""How many messages an update costs between nodes and the clock, by nodes and by rows, in virtual time.

    python benchmarks/clock_messages.py [--nodes 2,4,8,16] [--groups 32,128] [--updates 40] [--seeds 2]

The shards, the accounts and the pace are those of a run (`flowrl/simulate`); engines and trainer only sleep. A message
is a batch of a shard's questions, with its answer, or a state that a node is told; node 0's own are counted too.
Responses are long-tailed and rollout is the bottleneck, so that every group comes by itself: the most there can be to
say. What the controllers themselves cost, on real sockets, is `benchmarks/controllers.py`'s to measure.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    sys.path[0] = str(ROOT)  # some benchmarks in this folder have the names of packages
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", default="2,4,8,16")
    parser.add_argument("--groups", default="32,128", help="of an update")
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    print("| nodes | groups an update | messages an update | a node |\n|---|---|---|---|")
    for nodes in map(int, given.nodes.split(",")):
        for groups in map(int, given.groups.split(",")):
            found = mean(messages(nodes, groups, given.updates, seed) for seed in range(given.seeds))
            print(f"| {nodes} | {groups} | {found:.0f} | {found / nodes:.1f} |", flush=True)


def messages(nodes: int, groups: int, updates: int, seed: int) -> float:
    from flowrl.simulate import LogNormal, Setting, simulate

    setting = Setting(
        batch_groups=groups, max_staleness=1, engines=nodes, concurrency=max(1, groups // nodes), shards=nodes,
        clock_s=0.0005, durations=LogNormal(1.0, 1.0), row_train_s=0.3 / groups, step_s=0.1, updates=updates, seed=seed,
    )  # fmt: skip
    return simulate(setting).clock_messages


if __name__ == "__main__":
    main()
