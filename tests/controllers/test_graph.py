"""The graph follows from the columns, and what cannot run is refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controllers.drawing import graph_mermaid, graph_text
from controllers.graph import Edge, Graph
from controllers.stage import Kind, Stage, Unit


def stage(name: str, reads: str = "", writes: str = "", **fields: Any) -> Stage:
    return Stage(name=name, run="module:Name", reads=tuple(reads.split()), writes=tuple(writes.split()), **fields)


DIAMOND = [
    stage("join", "left right", "joined"),
    stage("left", "seed", "left"),
    stage("right", "seed", "right", optional=("joined",)),
    stage("source", "", "seed", kind=Kind.DRIVER),
]


def refusal(stages: list[Stage]) -> str:
    with pytest.raises(ValueError) as caught:
        Graph.of(stages)
    return str(caught.value)


def test_edges_follow_from_columns_and_order_from_edges() -> None:
    graph = Graph.of(DIAMOND)
    assert set(graph.edges) == {
        Edge("source", "left", ("seed",)),
        Edge("source", "right", ("seed",)),
        Edge("left", "join", ("left",)),
        Edge("right", "join", ("right",)),
        Edge("join", "right", ("joined",), is_optional=True),
    }
    assert [stage.name for stage in graph] == ["source", "left", "right", "join"]


def test_columns_of_other_partitions_are_out_of_reach() -> None:
    evaluation = stage("judge", "seed", partition="evaluation")
    assert "column 'seed' is written by no stage of partition 'evaluation'" in refusal([*DIAMOND, evaluation])


def test_circle_is_printed() -> None:
    text = refusal([stage("a", "z", "x"), stage("b", "x", "y"), stage("c", "y", "z")])
    assert re.search(r"(\w) -> (\w) -> (\w) -> \1", text)


def test_stage_that_reads_what_it_writes_is_a_circle() -> None:
    assert "a -> a" in refusal([stage("a", "x", "x")])


def test_after_edge_can_close_a_circle() -> None:
    assert "circle" in refusal([stage("a", "", "x", after=("b",)), stage("b", "x")])


def test_unwritten_column_is_refused_with_the_nearest_known() -> None:
    text = refusal([stage("a", "", "response_tokens"), stage("b", "responce_tokens")])
    assert text.startswith("stages.b.reads: column 'responce_tokens'")
    assert text.endswith("did you mean 'response_tokens'?")


def test_optional_column_may_be_unwritten() -> None:
    assert not Graph.of([stage("a", optional=("x",))]).edges


def test_drivers_that_write_the_same_columns_are_producers_of_the_same_rows() -> None:
    one, other = (stage(name, "", "seed more", kind=Kind.DRIVER) for name in ("one", "other"))
    graph = Graph.of([stage("reader", "seed", optional=("more",)), one, other])
    assert {(edge.source, edge.is_optional) for edge in graph.edges} == {
        (name, optional) for name in ("one", "other") for optional in (False, True)
    }


@pytest.mark.parametrize(
    "second",
    [
        stage("b", "", "x y", kind=Kind.DRIVER),
        stage("b", "", "x"),
        stage("b", "z", "x", kind=Kind.DRIVER),
    ],
)
def test_two_writers_that_are_no_producers_of_the_same_rows_are_refused(second: Stage) -> None:
    first = stage("a", "", "x", kind=Kind.DRIVER)
    assert "written by stage 'a' and by stage 'b'" in refusal([first, second, stage("c", "", "z")])


def test_two_writers_are_refused() -> None:
    assert "written by stage 'a' and by stage 'b'" in refusal([stage("a", "", "x"), stage("b", "", "x")])


BATCHES = [
    stage("source", "", "seed", kind=Kind.DRIVER),
    stage("weigh", "seed", "weight"),
    stage("rank", "weight", "place", unit=Unit.BATCH, worker="learn", optional=("hint",)),
    stage("scale", "place seed", "scaled", unit=Unit.BATCH, worker="learn"),
    stage("learn", "seed scaled", kind=Kind.DRIVER, unit=Unit.BATCH),
]


def test_stages_of_batches_run_with_the_driver_that_takes_them_for_all() -> None:
    graph = Graph.of(BATCHES)
    assert [member.name for member in graph.workers()["learn"]] == ["learn", "rank", "scale"]
    consumers = graph.consumers()
    assert list(consumers) == ["weigh", "learn"]
    assert consumers["learn"].reads == ("seed", "weight"), "what it and they read, less what they write"
    assert consumers["learn"].optional == ("hint",)


def test_of_stages_of_one_batch_the_writer_of_an_optional_column_comes_first() -> None:
    reader = stage("a_reader", "seed", "place", unit=Unit.BATCH, worker="learn", optional=("hint",))
    writer = stage("hints", "seed", "hint", unit=Unit.BATCH, worker="learn")
    graph = Graph.of([BATCHES[0], reader, writer, stage("learn", "place", kind=Kind.DRIVER, unit=Unit.BATCH)])
    assert [member.name for member in graph.workers()["learn"]] == ["learn", "hints", "a_reader"]
    assert graph.consumers()["learn"].optional == ()


def test_only_stages_of_batches_share_a_drivers_process_whatever_comes_first() -> None:
    mapped = stage("other", "seed", "more", worker="learn")
    for stages in ([*BATCHES, mapped], [mapped, *BATCHES]):
        assert "'learn' is a driver and owns its process" in refusal(stages)


def test_a_stage_of_batches_without_their_driver_is_refused() -> None:
    alone = [*BATCHES[:2], stage("rank", "weight", "place", unit=Unit.BATCH)]
    assert refusal(alone).startswith("stages.rank.unit: 'batch'; it runs with the one driver that takes batches")


def test_what_is_made_of_batches_never_reaches_the_queue() -> None:
    text = refusal([*BATCHES, stage("late", "scaled")])
    assert text.startswith("stages.late.reads: column 'scaled' is made of whole batches by stage 'scale'")


def test_unknown_after_and_duplicate_name_are_refused() -> None:
    assert refusal([stage("first"), stage("b", after=("frist",))]).endswith("did you mean 'first'?")
    assert "stages.a: declared twice" in refusal([stage("a"), stage("a")])


def test_stages_of_one_worker_share_pool_and_kind() -> None:
    assert "'gpu'" in refusal([stage("a", worker="w"), stage("b", worker="w", pool="gpu")])
    assert "'b' is a driver" in refusal([stage("a", worker="w"), stage("b", worker="w", kind=Kind.DRIVER)])


def test_workers_hold_their_stages_in_order() -> None:
    graph = Graph.of([stage("b", "x", worker="w"), stage("a", "", "x", worker="w"), stage("c")])
    assert {worker: [stage.name for stage in stages] for worker, stages in graph.workers().items()} == {
        "w": ["a", "b"],
        "c": ["c"],
    }


def test_drawings_name_every_stage_and_edge() -> None:
    graph = Graph.of(DIAMOND)
    text, mermaid = graph_text(graph), graph_mermaid(graph)
    assert "  -> join: left" in text and "  -> right: joined (optional)" in text
    assert mermaid.startswith("flowchart LR")
    assert 's0["source<br/>driver, cpu"]' in mermaid and 's3 -.->|"joined (optional)"| s2' in mermaid


@given(st.lists(st.sets(st.integers(0, 11)), max_size=12))
def test_every_stage_comes_after_those_it_reads_from(reads: list[set[int]]) -> None:
    """Stage i may read what earlier stages write; given backwards, the order is found again."""
    stages = [
        stage(f"s{index}", " ".join(f"c{other}" for other in sorted(others) if other < index), f"c{index}")
        for index, others in enumerate(reads)
    ]
    position = {stage.name: place for place, stage in enumerate(Graph.of(stages[::-1]))}
    assert all(position[edge.source] < position[edge.target] for edge in Graph.of(stages).edges)
