"""A run whose engine is on a node without a trainer rank: weights reach it by relays, version after version."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.integration.runs import ROOT, SMALL, events, run_to_end, sessions


@pytest.mark.timeout(400)
def test_engine_on_a_node_without_trainer_follows_the_trainer(tmp_path: Path) -> None:
    arguments = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--standalone",
        "-m", "flowrl", "run", str(ROOT / "recipes" / "quickstart_two_nodes.yaml"), *SMALL, "train.steps=8",
        "eval.every=4", "run.name=relayed", f"run.dir={tmp_path}/runs", f"model.path={tmp_path}/model",
        f"run.session_dir={sessions(tmp_path)}", "pools.train={nodes: [0]}", "pools.rollout={nodes: [1]}",
        "pools.eval={nodes: [1]}",
    ]  # fmt: skip
    code, output = run_to_end(arguments, timeout_s=380)
    assert code == 0, output
    run = tmp_path / "runs" / "relayed"
    log = events(run)
    assert set(Counter(event["node"] for event in log if event["kind"] == "sampled")) == {1}
    assert {event["node"] for event in log if event["kind"] == "published"} == {0}
    versions = {version for event in log if event["kind"] == "sampled" for version, _ in event["versions"]}
    assert len(versions) > 3 and max(versions) >= 6
    summary = json.loads((run / "summary.json").read_text())
    assert summary["max_staleness"] <= 2 and summary["accuracy_after"] is not None
    assert not list(sessions(tmp_path).iterdir())


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("way", ["model.lora={rank: 4}", "weights.transport=collective"])
def test_other_kinds_of_versions_cross_nodes_too(way: str, tmp_path: Path) -> None:
    """Adapters by relays; and without files, the group meeting at a port."""
    arguments = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--standalone",
        "-m", "flowrl", "run", str(ROOT / "recipes" / "quickstart_two_nodes.yaml"), *SMALL, "train.steps=6",
        "eval=null", "run.name=crossing", f"run.dir={tmp_path}/runs", f"model.path={tmp_path}/model",
        f"run.session_dir={sessions(tmp_path)}", "pools.train={nodes: [0]}", "pools.rollout={nodes: [1]}", way,
    ]  # fmt: skip
    code, output = run_to_end(arguments, timeout_s=380)
    assert code == 0, output
    log = events(tmp_path / "runs" / "crossing")
    assert {event["node"] for event in log if event["kind"] == "sampled"} == {1}
    assert max(version for event in log if event["kind"] == "sampled" for version, _ in event["versions"]) >= 3
    assert not list(sessions(tmp_path).iterdir())
