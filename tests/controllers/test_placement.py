"""Every controller computes the same workers from the same pools, or refuses, naming stage, pool and rule."""

from __future__ import annotations

from typing import Any

import pytest

from controllers.drawing import placement_text, plan_table
from controllers.graph import Graph
from controllers.placement import (
    Placement,
    Pool,
    WorkerPlan,
    backing_device,
    fingerprint,
    placement,
    plan,
    sharing,
)
from controllers.stage import Stage


def graph(**pools: str) -> Graph:
    return Graph.of([Stage(name=name, run="m:f", pool=pool) for name, pool in pools.items()])


def refusal(pools: list[Pool], num_nodes: int = 2, **stages: str) -> str:
    with pytest.raises(ValueError) as caught:
        plan(graph(**stages), pools, num_nodes)
    return str(caught.value)


def test_ranks_count_over_nodes_and_then_over_workers() -> None:
    gpus = Pool(name="gpu", workers=2, threads=4, devices=("cuda:0", "cuda:1", "cuda:2", "cuda:3"))
    plans = plan(graph(rollout="gpu"), [gpus], 2)
    assert [(p.name, p.rank, p.world_size, p.devices) for p in plans] == [
        ("rollout.0.0", 0, 4, ("cuda:0", "cuda:1")),
        ("rollout.0.1", 1, 4, ("cuda:2", "cuda:3")),
        ("rollout.1.0", 2, 4, ("cuda:0", "cuda:1")),
        ("rollout.1.1", 3, 4, ("cuda:2", "cuda:3")),
    ]


def test_pool_without_nodes_means_all_and_cpus_are_shared() -> None:
    plans = plan(graph(reward="cpu", train="one"), [Pool(name="cpu", workers=3), Pool(name="one", nodes=(1,))], 2)
    assert [p.name for p in plans if p.worker == "reward"] == [f"reward.{n}.{i}" for n in (0, 1) for i in range(3)]
    assert {p.devices for p in plans} == {("cpu",)}
    assert [(p.name, p.rank, p.world_size) for p in plans if p.worker == "train"] == [("train.1.0", 0, 1)]


def test_stages_of_one_worker_share_a_process() -> None:
    stages = [Stage(name=name, run="m:f", worker="stages") for name in ("reward", "advantage")]
    (only,) = plan(Graph.of(stages), [Pool(name="cpu")], 1)
    assert only.stages == ("reward", "advantage")


def test_refusals_name_stage_pool_and_rule() -> None:
    assert refusal([Pool(name="cpu")], train="gpu") == "stages.train.pool: 'gpu'; the pools are ['cpu']"
    beyond = refusal([Pool(name="gpu", nodes=(0, 2))], train="gpu")
    assert "pools.gpu.nodes: 2" in beyond and "'train'" in beyond and "nodes 0 to 1" in beyond
    few = refusal([Pool(name="gpu", workers=2, devices=("cuda:0",))], train="gpu")
    assert "pools.gpu.devices" in few and "'train'" in few and "a device of its own" in few
    assert "evenly" in refusal([Pool(name="gpu", workers=2, devices=("a", "b", "c"))], train="gpu")
    assert "unique" in refusal([Pool(name="cpu"), Pool(name="cpu")], train="cpu")


@pytest.mark.parametrize(
    "fields", [{"workers": 0}, {"threads": 0}, {"nodes": (1, 1)}, {"devices": ()}, {"devices": ("a", "a")}]
)
def test_impossible_pool_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^pools\.p\.{next(iter(fields))}: "):
        Pool(name="p", **fields)


def test_fingerprint_tells_plans_apart() -> None:
    def made(**fields: Any) -> tuple[WorkerPlan, ...]:
        return plan(graph(train="cpu"), [Pool(name="cpu", **fields)], 2)

    assert fingerprint(made()) == fingerprint(made())
    assert fingerprint(made()) != fingerprint(made(threads=2))


def test_table_has_a_line_a_worker() -> None:
    lines = plan_table(plan(graph(train="cpu", judge="cpu"), [Pool(name="cpu", workers=2)], 1)).splitlines()
    assert lines[0].split() == ["worker", "node", "rank", "pool", "threads", "devices", "stages"]
    assert lines[1].split() == ["train.0.0", "0", "0/2", "cpu", "1", "cpu", "train"]
    assert len(lines) == 5


def test_workers_that_name_one_device_share_it_and_the_host_is_everybodys() -> None:
    def planned(rollout: Pool, train: Pool) -> tuple[WorkerPlan, ...]:
        return plan(graph(rollout="r", train="t"), [rollout, train], 2)

    def pool(name: str, *devices: str, workers: int = 1, nodes: tuple[int, ...] = ()) -> Pool:
        return Pool(name=name, devices=devices, workers=workers, nodes=nodes)

    split = planned(pool("r", "cuda:0"), pool("t", "cuda:1"))
    assert placement(split, "rollout", "train") is Placement.SPLIT
    assert sharing(split, "rollout", "train") == {}
    host = planned(pool("r", "cpu"), pool("t", "cpu"))
    assert placement(host, "rollout", "train") is Placement.SPLIT

    colocated = planned(pool("r", "cuda:0", "cuda:1"), pool("t", "cuda:0", "cuda:1", workers=2))
    assert placement(colocated, "rollout", "train") is Placement.COLOCATED
    assert sharing(colocated, "rollout", "train") == {
        "rollout.0.0": ("train.0.0", "train.0.1"),
        "rollout.1.0": ("train.1.0", "train.1.1"),
        **{f"train.{node}.{index}": (f"rollout.{node}.0",) for node in (0, 1) for index in (0, 1)},
    }

    hybrid = planned(pool("r", "cpu:0", "cpu:1", workers=2), pool("t", "cpu:1", nodes=(1,)))
    assert placement(hybrid, "rollout", "train") is Placement.HYBRID
    assert sharing(hybrid, "rollout", "train") == {"rollout.1.1": ("train.1.0",), "train.1.0": ("rollout.1.1",)}
    text = placement_text(hybrid, "rollout", "train").splitlines()
    assert text[:2] == ["rollout and train: hybrid", "  node 1: rollout.1.1 and train.1.0 take turns at cpu:1"]
    assert [backing_device(device) for device in ("cpu", "cpu:1", "cuda:1")] == ["cpu", "cpu", "cuda:1"]
