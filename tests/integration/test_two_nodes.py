"""Two virtual nodes under torchrun: each has a controller, a queue shard, an engine and a trainer rank of its own."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.integration.runs import ROOT, SMALL, events, run_to_end, sessions


@pytest.mark.timeout(300)
def test_both_nodes_produce_and_consume(tmp_path: Path) -> None:
    arguments = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--standalone",
        "-m", "flowrl", "run", str(ROOT / "recipes" / "quickstart_two_nodes.yaml"), *SMALL, "train.steps=12",
        "run.name=two", f"run.dir={tmp_path}/runs", f"model.path={tmp_path}/model",
        f"run.session_dir={sessions(tmp_path)}",
    ]  # fmt: skip
    code, output = run_to_end(arguments, timeout_s=200)
    assert code == 0, output
    log = events(tmp_path / "runs" / "two")
    for kind in ("reserved", "sampled", "trained"):
        nodes = Counter(event["node"] for event in log if event["kind"] == kind)
        assert set(nodes) == {0, 1}, f"{kind}: {nodes}"
    trained = [tuple(event["key"]) for event in log if event["kind"] == "trained"]
    assert len(trained) == len(set(trained)) == 12 * 64
    sampled = {tuple(event["key"]): event["versions"] for event in log if event["kind"] == "sampled"}
    lags = [
        event["update"] - version
        for event in log if event["kind"] == "trained" for version, _ in sampled[tuple(event["key"])]
    ]  # fmt: skip
    assert min(lags) >= 0 and max(lags) <= 2
    assert not list(sessions(tmp_path).iterdir())
