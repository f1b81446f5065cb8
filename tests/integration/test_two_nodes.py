"""Two virtual nodes under torchrun: each has a controller, a queue shard, an engine and a trainer rank of its own."""

from __future__ import annotations

import re
import sys
import textwrap
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


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("arguments.append(f'train.seed={node}')", "has another recipe or placement than node"),
        ("pipeline.code_digest = lambda: f'state {node}'", r"has code state \d; node \d \(.*\) has state \d"),
    ],
)
def test_a_node_that_would_run_something_else_is_named_before_anything_starts(
    tmp_path: Path, line: str, message: str
) -> None:
    (tmp_path / "launch.py").write_text(
        textwrap.dedent(f"""
            import os, sys
            from flowrl import pipeline
            from flowrl.cli.main import main
            node, arguments = os.environ["RANK"], sys.argv[1:]
            {line}
            sys.exit(main(arguments))
        """)
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    arguments = [
        *launcher, str(tmp_path / "launch.py"), "run", str(ROOT / "recipes" / "quickstart_two_nodes.yaml"), *SMALL,
        "run.name=two", f"run.dir={tmp_path}/runs", f"model.path={tmp_path}/model",
        f"run.session_dir={sessions(tmp_path)}",
    ]  # fmt: skip
    code, output = run_to_end(arguments, timeout_s=150)
    assert code != 0
    assert re.search(rf"flowrl: node [01] \(.*\) {message}", output), output
    assert not list((tmp_path / "runs" / "two" / "logs").iterdir()), "a worker was started"
