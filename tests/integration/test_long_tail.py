"""The remedies for long tails and tied groups, all on, in whole small runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from flowrl.report.staleness_check import check_run
from tests.integration.runs import events, run_to_end, small_run

pytestmark = [pytest.mark.timeout(240), pytest.mark.slow]

FILTER = ("eval=null", "rollout.filter_tied=true")


@pytest.mark.parametrize(
    "switches",
    [("rollout.redundancy=2",), ("rollout.oversampling=6", "staleness.max=0")],
    ids=["redundancy", "oversampling"],
)
def test_tied_groups_are_replaced_and_the_first_to_end_are_trained(tmp_path: Path, switches: tuple[str, ...]) -> None:
    """Oversampling without staleness: what an update leaves over cannot be in the next one."""
    code, output = run_to_end(small_run(tmp_path, *FILTER, *switches, steps=6), timeout_s=220, cwd=tmp_path)
    assert code == 0, output
    run = tmp_path / "runs" / "small"
    log = events(run)
    trained = {tuple(event["key"]): event["update"] for event in log if event["kind"] == "trained"}
    assert Counter(trained.values()) == {update: 64 for update in range(6)}
    dropped = {tuple(event["key"]): event["reason"] for event in log if event["kind"] == "dropped"}
    assert "tied" in dropped.values() and not dropped.keys() & trained.keys()
    findings = check_run(run)
    assert findings.is_clean, findings
    if "staleness.max=0" in switches:
        assert findings.max_staleness == 0
        reserved = [tuple(event["key"]) for event in log if event["kind"] == "reserved"]
        assert "surplus" in dropped.values()
        again = {key[:3] for key in reserved if key[3] == 1}
        assert again <= {key[:3] for key, reason in dropped.items() if reason == "surplus"}
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {line["frac_reward_zero_std"] for line in metrics if "frac_reward_zero_std" in line} == {0.0}
