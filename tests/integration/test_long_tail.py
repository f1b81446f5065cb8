"""The remedies for long tails and tied groups, all on, in a whole small run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.integration.runs import events, run_to_end, small_run

pytestmark = pytest.mark.timeout(240)


@pytest.mark.slow
def test_tied_groups_are_replaced_and_the_first_to_end_are_trained(tmp_path: Path) -> None:
    overrides = ("eval=null", "rollout.filter_tied=true", "rollout.redundancy=2")
    code, output = run_to_end(small_run(tmp_path, *overrides, steps=6), timeout_s=220, cwd=tmp_path)
    assert code == 0, output
    run = tmp_path / "runs" / "small"
    log = events(run)
    trained = {tuple(event["key"]): event["update"] for event in log if event["kind"] == "trained"}
    assert Counter(trained.values()) == {update: 64 for update in range(6)}
    tied = {tuple(event["key"]) for event in log if event["kind"] == "dropped" and event["reason"] == "tied"}
    assert tied and not tied & trained.keys()
    sampled = {tuple(event["key"]): event["versions"] for event in log if event["kind"] == "sampled"}
    lags = [update - version for key, update in trained.items() for version, _ in sampled[key]]
    assert min(lags) >= 0 and max(lags) <= 2
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["frac_reward_zero_std"] for line in metrics if "frac_reward_zero_std" in line} == {0.0}
