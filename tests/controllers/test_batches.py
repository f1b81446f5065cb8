"""Stages that a driver hosts, on the batches that it has: in order, once, and named when they fail."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from controllers.batches import HostedStages
from controllers.stage import Stage, Unit
from transfer_queue.rows import Column, RowKey, Rows

BATCH = Rows([RowKey("train", group, 0) for group in range(3)], {"seed": Column.scalars([1.0, 2.0, 3.0], "float32")})


class Executor:
    def __init__(self, context: Any, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def process(self, rows: Rows) -> Any:
        if "error" in self.settings:
            raise ArithmeticError(self.settings["error"])
        if "ragged" in self.settings:
            return {"twice": Column.ragged(self.settings["ragged"], "float32")}
        if "result" in self.settings:
            return self.settings["result"]
        total = sum(column.values for column in rows.columns.values())
        return {name: Column.scalars(total * 2, "float32") for name in self.settings["gives"]}


def hosted(*stages: Stage, rank: int = 0) -> HostedStages:
    context: Any = SimpleNamespace(
        rank=rank,
        payload={"stages": [msgspec.to_builtins(stage) for stage in stages]},
        waiting_for=lambda what: nullcontext(),
    )
    return HostedStages(context)


def stage(name: str, reads: str, writes: str, **settings: Any) -> Stage:
    settings.setdefault("gives", writes.split())
    return Stage(
        name=name, run=f"{__name__}:Executor", unit=Unit.BATCH, reads=tuple(reads.split()),
        writes=tuple(writes.split()), one_value=tuple(writes.split()), settings=settings,
    )  # fmt: skip


def test_each_reads_what_it_declares_and_what_those_before_it_have_written() -> None:
    written = hosted(stage("double", "seed", "twice"), stage("again", "twice seed", "more")).process(BATCH)
    assert list(written.columns) == ["twice", "more"], "what was there is the driver's already"
    assert written["more"].values.tolist() == [6.0, 12.0, 18.0]


def test_ranks_beside_the_first_know_of_them_and_make_none() -> None:
    stages = hosted(stage("double", "seed", "twice", error="never made"), rank=1)
    assert stages and stages.names == ["double"]
    assert not stages.process(BATCH).columns


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"error": "no"}, r"stage 'double': ArithmeticError\('no'\)"),
        ({"gives": ["other"]}, r"stage 'double': .*stages\.double\.writes: \['twice'\], but process gave \['other'\]"),
        ({"result": None}, r"stages\.double\.writes: \['twice'\], but process gave \[\]"),
        ({"result": [1]}, r"stages\.double\.writes: \['twice'\], but process gave a list, no mapping of columns"),
        ({"result": {"twice": [1, 2, 3]}}, r"stages\.double\.writes: 'twice' is a list; must be a Column"),
        (
            {"ragged": [[1], [], [2, 3]]},
            r"stages\.double\.writes: 'twice' has \[0, 1, 2\] values in a row; must have one in each",
        ),
    ],
)
def test_one_that_fails_or_gives_other_columns_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        hosted(stage("double", "seed", "twice", **settings)).process(BATCH)
