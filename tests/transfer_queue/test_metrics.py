"""The report of a shard as Prometheus text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from tests.transfer_queue.conftest import fill
from transfer_queue import wire
from transfer_queue.metrics import prometheus

Make = Callable[..., Any]
SAMPLE = re.compile(
    r'(transfer_queue_[a-z_]+)\{((?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)+)\} (-?\d+(?:\.\d+)?(?:e-?\d+)?)'
)


def samples(text: str) -> dict[tuple[str, str], float]:
    """Every line is a comment, or a sample that this grammar reads."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = SAMPLE.fullmatch(line)
            assert match is not None, line
            found[match[1].removeprefix("transfer_queue_"), match[2]] = float(match[3])
    return found


def test_every_count_of_a_shard_is_a_sample(direct_shard: Make) -> None:
    shard = direct_shard(batch_rows=4, max_staleness=1)
    shard.announce("p", 0)
    groups = shard.reserve(groups=8, row_bytes=100)
    fill(shard, groups[:3])
    shard.put(groups[3].keys, ("tokens",), [0])
    shard.ask(wire.Drop, groups[3].keys, "tied")
    shard.take("train", 2, update=0)
    shard.take("reward", 1)
    shard.take("advantage", 9, wait_s=9.0)
    shard.take("train", 2, update=7, wait_s=9.0)
    found = samples(prometheus({"here": shard.shard.describe()}))
    here = 'shard="here"'
    assert found["update_filled_rows", here] == 2
    assert found["outstanding_rows", f'{here},partition="train",deadline="1"'] == 5
    assert found["promised_bytes", here] == 700
    assert found["ended_rows_total", f'{here},reason="tied"'] == 1
    assert found["consumer_rows", f'{here},consumer="reward",state="leased"'] == 1
    assert found["consumer_rows", f'{here},consumer="train",state="ready"'] == 1
    assert found["waiters", f'{here},verb="take",for="update"'] == 1
    assert found["producer_version", f'{here},producer="p"'] == 0


def test_names_that_need_it_are_escaped_and_shards_told_apart(direct_shard: Make) -> None:
    shard = direct_shard()
    shard.announce('a "b"\\c\nd', 3)
    report = shard.shard.describe()
    found = samples(prometheus({"one": report, "two": report}))
    assert found["producer_version", 'shard="one",producer="a \\"b\\"\\\\c\\nd"'] == 3
    assert found["version", 'shard="two"'] == 0


def test_each_metric_is_described_once(direct_shard: Make) -> None:
    report = direct_shard().shard.describe()
    lines = prometheus({"one": report, "two": report}).splitlines()
    helps = [line.split()[2] for line in lines if line.startswith("# HELP")]
    types = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    assert helps == types == sorted(set(helps), key=helps.index)
    assert {line.split("{")[0] for line in lines if not line.startswith("#")} == set(helps)
