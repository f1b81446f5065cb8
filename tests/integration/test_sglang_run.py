"""Ten steps of the quickstart against the real SGLang server on a CPU, by the code that the embedded engine is used by,
and what it sampled replayed without it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.integration.runs import ROOT, events, run_to_end, small_run
from tests.integration.test_determinism import assert_same_bits
from tests.rollout.sglang_environment import sglang_python

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(400)]


@pytest.mark.slow
def test_servers_and_an_embedded_engine_sample_for_one_trainer(tmp_path: Path) -> None:
    """As many updates as the embedded engine takes to be far from done when the server is there."""
    overrides = (
        "rollout.concurrency=1", "producers={servers: {pool: servers, engine: sglang, concurrency: 4, "
        f"python: {sglang_python()}}}}}", "pools.servers.threads=1", "eval=null", "train.steps=700",
    )  # fmt: skip
    code, output = run_to_end(small_run(tmp_path, *overrides), timeout_s=350, cwd=ROOT)
    assert code == 0, output
    log = events(tmp_path / "runs" / "small")
    trained = {tuple(event["key"]) for event in log if event["kind"] == "trained"}
    producers = {event["producer"] for event in log if event["kind"] == "reserved" and tuple(event["key"]) in trained}
    assert len(trained) == 700 * 64 and producers == {"rollout.0.0", "servers.0.0"}


def test_ten_steps_train_through_a_real_server_and_are_replayed_bit_for_bit(tmp_path: Path) -> None:
    overrides = ("rollout.engine=sglang", f"rollout.python={sglang_python()}", "eval.every=10")
    code, output = run_to_end(small_run(tmp_path, *overrides, steps=10), timeout_s=350, cwd=ROOT)
    assert code == 0, output
    run = tmp_path / "runs" / "small"
    assert json.loads((run / "summary.json").read_text())["steps"] == 10
    log = events(run)
    sampled = {tuple(event["key"]): event["versions"] for event in log if event["kind"] == "sampled"}
    trained = {tuple(event["key"]): event["update"] for event in log if event["kind"] == "trained"}
    assert len(trained) == 10 * 64
    lags = [update - version for key, update in trained.items() for version, _ in sampled[key]]
    assert min(lags) >= 0 and max(lags) <= 2
    assert max(version for spans in sampled.values() for version, _ in spans) > 5, "the server never took new weights"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    differences = [line["training/rollout_probs_diff_mean"] for line in metrics if "actor/entropy" in line]
    assert len(differences) == 10 and max(differences) < 0.2
    again = tmp_path / "replay"
    code, output = run_to_end([sys.executable, "-m", "flowrl", "replay", str(run), "--out", str(again)], cwd=ROOT)
    assert code == 0 and "10 updates replayed on 1 rank" in output, output
    assert_same_bits(run / "model", again / "model")
