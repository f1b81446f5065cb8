"""What a recipe may say of servers, long tails and stops, and the graph that comes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowrl.config import load
from flowrl.pipeline import stages

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.servers=2"], "rollout.servers: 2; only rollout.engine=sglang has that"),
        (["rollout.urls=[http://a]"], "rollout.urls: ['http://a']; only rollout.engine=sglang"),
        (["rollout.routed_experts=true"], "rollout.routed_experts: True; only rollout.engine=sglang"),
        (["rollout.engine=sglang", "rollout.servers=0"], "rollout.servers: 0; must be at least 1"),
        (["rollout.engine=sglang", "rollout.servers=2", "rollout.urls=[http://a]"], "rollout.urls names servers"),
        (["rollout.redundancy=-1"], "rollout.redundancy: -1; must be at least 0"),
        (["rollout.redundancy=2", "rollout.handover=batch"], "rollout.redundancy: 2; rollout.handover=batch"),
        (["rollout.oversampling=-1"], "rollout.oversampling: -1; must be at least 0"),
        (["rollout.oversampling=8", "rollout.handover=batch"], "rollout.oversampling: 8; rollout.handover=batch"),
        (["rollout.filter_tied=true", "rollout.handover=batch"], "rollout.filter_tied: True; rollout.handover=batch"),
        (["rollout.stop_strings=['']"], "rollout.stop_strings: ['']"),
    ],
)
def test_a_mistake_is_refused_with_field_value_and_rule(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        load(QUICKSTART, overrides)
    assert message in str(error.value)


@pytest.mark.parametrize("algorithm", ["grpo", "reinforce_plus_plus"])
def test_whoever_follows_the_filter_waits_for_it(algorithm: str) -> None:
    recipe = load(QUICKSTART, [f"algorithm.name={algorithm}", "rollout.filter_tied=true"])
    declared = {stage.name: stage for stage in stages(recipe)}
    assert declared["tied"].writes == ("is_untied",)
    follower = declared.get("advantage", declared["train"])
    assert "is_untied" in follower.reads


def test_without_the_filter_nobody_reads_or_writes_its_column() -> None:
    for stage in stages(load(QUICKSTART)):
        assert "is_untied" not in (*stage.reads, *stage.writes)
