"""The directory of a sweep: which points belong to it and what became of each. A sweep is taken up again from it.

OUT/sweep.json          the plan: recipe, axes, points      OUT/points/NAME/    the run of a point
    outcomes/NAME.json  how a point ended                   OUT/logs/NAME.log   what its run printed
    abandoned/          what interrupted or repeated points had left
"""

from __future__ import annotations

import enum
import fcntl
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from flowrl.config import load
from flowrl.sweep.axes import Point
from flowrl.weights.place import versions_on_disk


class State(enum.Enum):
    """A point that is waiting, running or was interrupted has no outcome; every other one has one of these."""

    FINISHED = "finished"
    FAILED = "failed"
    TIMED_OUT = "timed out"
    PRUNED = "pruned"

    @property
    def is_good(self) -> bool:
        return self in (State.FINISHED, State.PRUNED)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """wall_s: of the whole run. reason: for an end that was not a good one, the run's own words."""

    state: State
    wall_s: float
    reason: str = ""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """recipe: its path. fields: what the points set. rest_hash: of all that they do not set, which is one for all.
    search, metric, goal: as on the command line."""

    recipe: str
    fields: tuple[str, ...]
    rest_hash: str
    search: str
    metric: str
    goal: str
    points: tuple[Point, ...]

    @property
    def varying(self) -> list[str]:
        """Fields with more than one value, in the order of the command line."""
        values: dict[str, set[str]] = {}
        for point in self.points:
            for field, value in point.settings:
                values.setdefault(field, set()).add(value)
        return [field for field, seen in values.items() if len(seen) > 1]


PLAN_FILE = "sweep.json"


class SweepDirectory:
    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.runs = self.path / "points"

    def run_of(self, point: Point) -> Path:
        return self.runs / point.name

    def log_of(self, point: Point) -> Path:
        return self.path / "logs" / f"{point.name}.log"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Raises ValueError if another sweep works here."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"--out: {str(self.path)!r}; another sweep is at work there") from None
            yield

    def read_plan(self) -> Plan | None:
        """Raises ValueError for a file that is no plan."""
        path = self.path / PLAN_FILE
        if not path.is_file():
            return None
        try:
            return msgspec.json.decode(path.read_bytes(), type=Plan)
        except msgspec.DecodeError as error:
            raise ValueError(f"sweep: {str(path)!r} is not a sweep's plan: {error}") from None

    def join(self, plan: Plan) -> Plan:
        """The plan, with what the directory knows already: its points stay, and the new ones keep clear of their names.

        Raises ValueError if the directory belongs to another recipe."""
        known = self.read_plan()
        if known is None:
            return plan
        if sorted(known.fields) != sorted(plan.fields):
            raise ValueError(
                f"--out: {str(self.path)!r}; holds a sweep over {', '.join(known.fields)}, not "
                f"{', '.join(plan.fields)}; give the same fields (their values may grow), or choose another directory"
            )
        if known.rest_hash != plan.rest_hash:
            raise ValueError(
                f"--out: {str(self.path)!r}; holds a sweep of {known.recipe} that differs from this recipe in fields "
                "which no axis sets; choose another directory"
            )
        return msgspec.structs.replace(plan, points=merged(known.points, plan.points))

    def write_plan(self, plan: Plan) -> None:
        _write(self.path / PLAN_FILE, msgspec.json.format(msgspec.json.encode(plan), indent=2))

    def outcome(self, point: Point) -> Outcome | None:
        path = self._outcome_path(point)
        return msgspec.json.decode(path.read_bytes(), type=Outcome) if path.is_file() else None

    def write_outcome(self, point: Point, outcome: Outcome) -> None:
        _write(self._outcome_path(point), msgspec.json.format(msgspec.json.encode(outcome), indent=2))

    def set_aside(self, point: Point) -> None:
        """Makes room for a point's run; what it left before is kept in `abandoned/`, and versions of its weights on a
        shared disk beside where they were."""
        self._outcome_path(point).unlink(missing_ok=True)
        versions = _versions_on_disk(self.run_of(point) / "recipe.yaml")
        if versions is not None and versions.exists():
            versions.rename(_free(versions.with_name(f"{versions.name}.abandoned")))
        for left in (self.run_of(point), self.log_of(point)):
            if left.exists():
                target = _free(self.path / "abandoned" / left.name)
                target.parent.mkdir(exist_ok=True)
                left.rename(target)

    def set_part_aside(self, name: str, node: int) -> None:
        """As `set_aside`, on a node whose disk is its own. On a shared one node 0 has made room already, and what is
        there now is the new run, in which this node has no part yet."""
        run = self.runs / name
        if (run / f"recipe.node{node}.yaml").exists():
            target = _free(self.path / "abandoned" / name)
            target.parent.mkdir(exist_ok=True)
            run.rename(target)

    def _outcome_path(self, point: Point) -> Path:
        return self.path / "outcomes" / f"{point.name}.json"


def merged(known: Sequence[Point], wanted: Sequence[Point]) -> tuple[Point, ...]:
    """By their settings; a known point keeps its name, and a new one gets another if its own is taken."""
    by_settings = {frozenset(point.settings): point for point in known}
    names = {point.name for point in known}
    for point in wanted:
        key = frozenset(point.settings)
        if key in by_settings:
            continue
        if point.name in names:
            digest = hashlib.sha256(repr(point.settings).encode()).hexdigest()[:8]
            point = Point(name=f"{point.name}_{digest}", settings=point.settings)
        names.add(point.name)
        by_settings[key] = point
    return tuple(by_settings.values())


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content + b"\n")
    temporary.rename(path)


def _versions_on_disk(recipe_path: Path) -> Path | None:
    """Where the run of that recipe published its weights, if that outlives it."""
    if not recipe_path.is_file():
        return None
    recipe = load(recipe_path)
    return versions_on_disk(recipe)


def _free(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return candidate
