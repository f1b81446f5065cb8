"""The DAG: edges derived from the columns that stages read and write. Pure: no I/O, no processes.

Edges run from the writer of a column to its readers in the same partition, and from a stage to those that start `after`
it. Drivers that read nothing and write the same columns are *producers* of the same rows, each of which one of them
makes. An optional column gives an edge that nobody waits for, so it may close a circle. Where stages run is
`placement.py`'s matter, how it looks `drawing.py`'s.

Batches are the clock's: only a driver takes them. A mapped stage whose unit is the batch is therefore *hosted*: it runs
in the process of that driver, on what the driver has taken, and the queue never sees what it writes.
"""

from __future__ import annotations

import difflib
import graphlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from controllers.stage import Kind, Stage


@dataclass(frozen=True)
class Edge:
    """`columns` is empty for an `after` edge. is_optional: the target never waits for these columns."""

    source: str
    target: str
    columns: tuple[str, ...] = ()
    is_optional: bool = False


@dataclass(frozen=True)
class Graph:
    """stages: in topological order, ties as they were given."""

    stages: tuple[Stage, ...]
    edges: tuple[Edge, ...]

    @classmethod
    def of(cls, stages: Iterable[Stage]) -> Graph:
        """Raises ValueError, by name, for whatever cannot run."""
        given = tuple(stages)
        _refuse_duplicates(given)
        _refuse_mixed_workers(given)
        edges = (*_column_edges(given), *_after_edges(given))
        _refuse_readers_of_hosted(given, edges)
        return cls(_sorted(given, edges), edges)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"stage {name!r}: unknown{_nearest(name, [stage.name for stage in self.stages])}")

    def workers(self) -> dict[str, tuple[Stage, ...]]:
        """Worker -> its stages, both in topological order, but for drivers, which come before those that they host."""
        found: dict[str, list[Stage]] = {}
        for stage in self.stages:
            found.setdefault(stage.worker, []).append(stage)
        return {worker: tuple(sorted(members, key=lambda stage: stage.is_hosted)) for worker, members in found.items()}

    def consumers(self) -> dict[str, Stage]:
        """Those that take rows from the queue, by name: a driver asks for what it and those that it hosts read, less
        what these write."""
        return {stage.name: self._with_hosted(stage) for stage in self.stages if stage.reads and not stage.is_hosted}

    def _with_hosted(self, stage: Stage) -> Stage:
        if not stage.takes_batches:
            return stage
        together = [stage, *(other for other in self.stages if other.is_hosted and other.worker == stage.worker)]
        made = {column for other in together for column in other.writes}
        reads = dict.fromkeys(column for other in together for column in other.reads if column not in made)
        optional = dict.fromkeys(column for other in together for column in other.optional if column not in made)
        return replace(stage, reads=tuple(reads), optional=tuple(name for name in optional if name not in reads))


def _refuse_duplicates(stages: Sequence[Stage]) -> None:
    seen: set[str] = set()
    for stage in stages:
        if stage.name in seen:
            raise ValueError(f"stages.{stage.name}: declared twice; a stage's name must be unique")
        seen.add(stage.name)


def _refuse_mixed_workers(stages: Sequence[Stage]) -> None:
    first: dict[str, Stage] = {}
    owners: dict[str, Stage] = {}
    for stage in stages:
        other = first.setdefault(stage.worker, stage)
        if other.pool != stage.pool:
            raise ValueError(
                f"stages.{stage.name}.pool: {stage.pool!r}; it shares worker {stage.worker!r} with stage "
                f"{other.name!r}, whose pool is {other.pool!r}; stages of one worker must name one pool"
            )
        other = owners.setdefault(stage.worker, stage) if not stage.is_hosted else stage
        if other.kind != stage.kind:
            driver = stage if stage.kind is Kind.DRIVER else other
            raise ValueError(
                f"stages.{stage.name}.worker: {stage.worker!r}; {driver.name!r} is a driver and owns its process, so "
                f"that mapped stages cannot share it"
            )


def _refuse_readers_of_hosted(stages: Sequence[Stage], edges: Sequence[Edge]) -> None:
    """The driver must be there, and the queue cannot hand on what it never sees."""
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        hosts = [other.name for other in stages if other.takes_batches and other.worker == stage.worker]
        if stage.is_hosted and len(hosts) != 1:
            rule = "it runs with the one driver that takes batches, whose worker it must name"
            raise ValueError(f"stages.{stage.name}.unit: 'batch'; {rule}; worker {stage.worker!r} has {hosts}")
    for edge in edges:
        source, target = by_name[edge.source], by_name[edge.target]
        if source.is_hosted and edge.columns and target.worker != source.worker:
            raise ValueError(
                f"stages.{target.name}.reads: column {edge.columns[0]!r} is made of whole batches by stage "
                f"{source.name!r}; only stages that take those batches can read it"
            )


def _column_edges(stages: Sequence[Stage]) -> tuple[Edge, ...]:
    writers = _writers(stages)
    columns: dict[tuple[str, str, bool], list[str]] = {}
    for stage in stages:
        for column in stage.reads:
            sources = writers.get((stage.partition, column), ())
            if not sources:
                known = sorted(name for partition, name in writers if partition == stage.partition)
                raise ValueError(
                    f"stages.{stage.name}.reads: column {column!r} is written by no stage of partition "
                    f"{stage.partition!r}{_nearest(column, known)}"
                )
            for source in sources:
                columns.setdefault((source, stage.name, False), []).append(column)
        for column in stage.optional:
            for source in writers.get((stage.partition, column), ()):
                columns.setdefault((source, stage.name, True), []).append(column)
    return tuple(Edge(source, target, tuple(names), optional) for (source, target, optional), names in columns.items())


def _writers(stages: Sequence[Stage]) -> dict[tuple[str, str], list[str]]:
    """(partition, column) -> stages: one, or producers of the same rows."""
    writers: dict[tuple[str, str], list[Stage]] = {}
    for stage in stages:
        for column in stage.writes:
            others = writers.setdefault((stage.partition, column), [])
            if others and not _are_producers(others[0], stage):
                raise ValueError(
                    f"column {column!r} of partition {stage.partition!r}: written by stage {others[0].name!r} and by "
                    f"stage {stage.name!r}; a column has one writer, or producers that write the same columns"
                )
            others.append(stage)
    return {place: [stage.name for stage in found] for place, found in writers.items()}


def _are_producers(one: Stage, other: Stage) -> bool:
    are_drivers = one.kind is other.kind is Kind.DRIVER
    return are_drivers and not (one.reads or other.reads) and set(one.writes) == set(other.writes)


def _after_edges(stages: Sequence[Stage]) -> tuple[Edge, ...]:
    names = [stage.name for stage in stages]
    for stage in stages:
        for other in stage.after:
            if other not in names:
                raise ValueError(f"stages.{stage.name}.after: {other!r} is no stage{_nearest(other, names)}")
    return tuple(Edge(other, stage.name) for stage in stages for other in stage.after)


def _sorted(stages: Sequence[Stage], edges: Sequence[Edge]) -> tuple[Stage, ...]:
    waits_for: dict[str, list[str]] = {stage.name: [] for stage in stages}
    hosted = {stage.name for stage in stages if stage.is_hosted}
    for edge in edges:
        # Nobody waits for an optional column; but of stages that are run one after the other its writer comes first.
        if not edge.is_optional or {edge.source, edge.target} <= hosted:
            waits_for[edge.target].append(edge.source)
    try:
        order = list(graphlib.TopologicalSorter(waits_for).static_order())
    except graphlib.CycleError as error:
        circle = error.args[1]
        raise ValueError(f"stages: a circle, {' -> '.join(circle)}; each waits for the one before it") from None
    by_name = {stage.name: stage for stage in stages}
    return tuple(by_name[name] for name in order)


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""
