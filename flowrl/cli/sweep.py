"""`flowrl sweep RECIPE field=value,value,… --out DIR`: one run for every point, and what became of each."""

from __future__ import annotations

import argparse
import hashlib
import signal
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from controllers.topology import Topology
    from flowrl.config import Recipe
    from flowrl.sweep.axes import Axis, Point
    from flowrl.sweep.directory import SweepDirectory
    from flowrl.sweep.nodes import Nodes


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML recipe")
    parser.add_argument("axes", nargs="*", metavar="field.name=value,value", help="what varies; or LOW..HIGH[:log]")
    parser.add_argument("--out", type=Path, required=True, help="the sweep's directory; one that exists is taken up")
    parser.add_argument("--dry-run", action="store_true", help="list the points; start nothing")
    parser.add_argument("--jobs", type=int, default=1, help="points at once (1)")
    parser.add_argument("--timeout", type=float, metavar="S", help="seconds after which a point is ended and given up")
    parser.add_argument("--retry", action="store_true", help="do failed points anew; what they left is kept")
    parser.add_argument("--search", choices=("grid", "random", "halving"), default="grid")
    parser.add_argument("--trials", type=int, help="points that random and halving draw")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    parser.add_argument("--metric", default="accuracy", help="for halving: accuracy, or a name in metrics.jsonl")
    parser.add_argument("--goal", choices=("maximize", "minimize"), default="maximize", help="of --metric")
    parser.add_argument("--min-updates", type=int, default=100, help="before halving gives a point up (100)")
    parser.add_argument("--reduction", type=int, default=3, help="halving keeps one in so many at each rung (3)")


def run(arguments: argparse.Namespace) -> int:
    from controllers.topology import Topology

    topology = Topology.from_environment()
    refuse_odd_options(arguments, topology)
    axes, points = read_points(arguments)
    recipes = check_points(arguments.recipe, points, topology.num_nodes)
    if arguments.dry_run:
        if topology.node == 0:
            print("\n".join(" ".join(point.overrides) or point.name for point in points))
        return 0
    interface = recipes[0].network.interface
    if not topology.is_on_one_host and not recipes[0].network.trusted:
        raise ValueError("network.trusted: false; a sweep over several machines speaks by torch RPC, as its runs do")
    if topology.node > 0:
        return follow_sweep(arguments.out, topology, interface)
    return lead_sweep(arguments, axes, points, recipes, topology)


def refuse_odd_options(arguments: argparse.Namespace, topology: Topology) -> None:
    if arguments.jobs < 1:
        raise ValueError(f"--jobs: {arguments.jobs}; must be at least 1")
    if arguments.jobs > 1 and topology.num_nodes > 1:
        raise ValueError(f"--jobs: {arguments.jobs}; points that span nodes are done one after another")
    if arguments.timeout is not None and arguments.timeout <= 0:
        raise ValueError(f"--timeout: {arguments.timeout}; must be above 0 seconds")
    if (arguments.search == "grid") != (arguments.trials is None):
        raise ValueError(f"--trials: {arguments.trials}; --search random and halving need it, and only they take it")
    for name, least in (("trials", 1), ("min_updates", 1), ("reduction", 2)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')}: {value}; must be at least {least}")


def read_points(arguments: argparse.Namespace) -> tuple[list[Axis], list[Point]]:
    from flowrl.sweep.axes import grid, parse_axes
    from flowrl.sweep.search import draw

    axes = parse_axes(arguments.axes)
    if arguments.search == "grid":
        return axes, grid(axes)
    return axes, draw(axes, arguments.trials, arguments.seed)


def check_points(recipe: str, points: Sequence[Point], num_nodes: int) -> list[Recipe]:
    """Every point's recipe, before anything starts. Raises ValueError naming the first point that cannot be."""
    from flowrl import config, pipeline

    found = []
    for point in points:
        try:
            found.append(config.load(recipe, point.overrides))
            pipeline.build(found[-1], num_nodes)
        except ValueError as error:
            raise ValueError(f"point {point.name}: {error}" if len(points) > 1 else str(error)) from None
    return found


def hash_of_rest(recipe: Recipe, fields: Sequence[str]) -> str:
    """Of all that no axis sets. A run's place and name are the sweep's to choose."""
    from omegaconf import OmegaConf

    from flowrl.config import to_yaml

    left = OmegaConf.create(to_yaml(recipe))
    for field in (*fields, "run.name", "run.dir"):
        OmegaConf.update(left, field, None, force_add=True)
    return hashlib.sha256(OmegaConf.to_yaml(left, sort_keys=True).encode()).hexdigest()[:16]


def lead_sweep(
    arguments: argparse.Namespace, axes: list[Axis], points: list[Point], recipes: list[Recipe], topology: Topology
) -> int:
    from flowrl.sweep.directory import SweepDirectory
    from flowrl.sweep.display import SweepDisplay
    from flowrl.sweep.nodes import Leader, OneNode
    from flowrl.sweep.search import Halving
    from flowrl.sweep.work import Terms, Work

    fields = [axis.field for axis in axes]
    directory = SweepDirectory(arguments.out)
    terms = Terms(
        recipe=arguments.recipe,
        jobs=arguments.jobs,
        timeout_s=arguments.timeout,
        metric=arguments.metric,
        has_own_models=any(field.startswith("model.init") for field in fields) and "model.path" not in fields,
    )
    halving = None
    if arguments.search == "halving":
        halving = Halving(arguments.goal, arguments.min_updates, arguments.reduction)
    with directory.locked():
        chosen, varying = join_plan(arguments, directory, fields, points, recipes[0])
        nodes: Nodes = Leader(topology, recipes[0].network.interface) if topology.num_nodes > 1 else OneNode()
        try:
            with SweepDisplay(chosen, varying) as display:
                Work(directory, terms, display, nodes, halving).run(chosen, _stopping_on_signals())
        finally:
            nodes.close()
        if nodes.lost():
            print(f"the sweep ended early: {nodes.lost()}")
        return tell_end(directory, chosen)


def join_plan(
    arguments: argparse.Namespace, directory: SweepDirectory, fields: list[str], points: list[Point], recipe: Recipe
) -> tuple[list[Point], list[str]]:
    """Writes what belongs to the sweep from now on. The points to do, by the names that they have there, and the fields
    that vary. Failed points that are to be done anew have lost their outcome."""
    from flowrl.sweep.directory import Plan

    wanted = Plan(
        recipe=arguments.recipe,
        fields=tuple(fields),
        rest_hash=hash_of_rest(recipe, fields),
        search=arguments.search,
        metric=arguments.metric,
        goal=arguments.goal,
        points=tuple(points),
    )
    plan = directory.join(wanted)
    directory.write_plan(plan)
    known = {frozenset(point.settings): point for point in plan.points}
    chosen = [known[frozenset(point.settings)] for point in points]
    for point in chosen if arguments.retry else ():
        outcome = directory.outcome(point)
        if outcome is not None and not outcome.state.is_good:
            directory.set_aside(point)
    return chosen, plan.varying


def tell_end(directory: SweepDirectory, chosen: Sequence[Point]) -> int:
    """What is left to do, and by which command. The exit code."""
    outcomes = [directory.outcome(point) for point in chosen]
    bad = [point.name for point, outcome in zip(chosen, outcomes, strict=True) if outcome and not outcome.state.is_good]
    if bad:
        print(f"failed: {', '.join(bad)} (logs in {directory.path / 'logs'}; --retry does them anew)")
    if None in outcomes:
        print("interrupted; the same command goes on where this one ended")
        return 130
    print(f"flowrl report {directory.path} draws it")
    return 1 if bad else 0


def follow_sweep(out: Path, topology: Topology, interface: str) -> int:
    from controllers.reaper import Reaper
    from flowrl.sweep.directory import SweepDirectory
    from flowrl.sweep.nodes import follow

    scratch = out.resolve() / f".running.node{topology.node}"
    reaper = Reaper(scratch)
    # torchrun passes a signal on to all; node 0 decides what it means for the points.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    try:
        return follow(topology, interface, SweepDirectory(out), reaper)
    finally:
        reaper.close()


def _stopping_on_signals() -> Event:
    stopping = Event()

    def stop(_signum: int, _frame: Any) -> None:
        stopping.set()

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    return stopping
