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
