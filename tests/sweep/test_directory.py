"""A sweep's directory remembers its points, takes more of them, and refuses another recipe's."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from flowrl.config import load, to_yaml
from flowrl.sweep.axes import Point, grid, parse_axes
from flowrl.sweep.directory import Outcome, Plan, State, SweepDirectory

ROOT = Path(__file__).resolve().parents[2]


def plan_of(*axes: str, rest: str = "rest") -> Plan:
    parsed = parse_axes(axes)
    return Plan(
        recipe="r.yaml",
        fields=tuple(axis.field for axis in parsed),
        rest_hash=rest,
        search="grid",
        metric="accuracy",
        goal="maximize",
        points=tuple(grid(parsed)),
    )


def test_a_plan_comes_back_and_grows_by_new_points_only(tmp_path: Path) -> None:
    directory = SweepDirectory(tmp_path)
    first = plan_of("staleness.max=0,1", "train.seed=0")
    directory.write_plan(directory.join(first))
    grown = SweepDirectory(tmp_path).join(plan_of("staleness.max=1,2", "train.seed=0,1"))
    assert grown.points[:2] == first.points, "what was there keeps its names"
    assert {frozenset(point.settings) for point in grown.points} == {
        frozenset({("staleness.max", eta), ("train.seed", seed)})
        for eta, seed in (("0", "0"), ("1", "0"), ("1", "1"), ("2", "0"), ("2", "1"))
    }
    assert len({point.name for point in grown.points}) == 5
    assert grown.varying == ["staleness.max", "train.seed"]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (plan_of("staleness.max=0", rest="other"), "differs from this recipe"),
        (plan_of("train.seed=0"), "a sweep over staleness.max, not train.seed"),
    ],
)
def test_another_sweep_is_refused_its_directory(tmp_path: Path, other: Plan, words: str) -> None:
    directory = SweepDirectory(tmp_path)
    directory.write_plan(plan_of("staleness.max=0"))
    with pytest.raises(ValueError, match=words):
        directory.join(other)


def test_two_sweeps_at_once_in_one_directory_are_refused(tmp_path: Path) -> None:
    with (
        SweepDirectory(tmp_path).locked(),
        pytest.raises(ValueError, match="another sweep is at work"),
        SweepDirectory(tmp_path).locked(),
    ):
        pass


def test_what_a_point_left_is_set_aside_never_deleted(tmp_path: Path) -> None:
    directory, point = SweepDirectory(tmp_path), Point(name="p", settings=())
    for life in range(2):
        directory.run_of(point).mkdir(parents=True)
        (directory.run_of(point) / "life").write_text(str(life))
        directory.write_outcome(point, Outcome(state=State.FAILED, wall_s=1.0, reason="moon"))
        directory.set_aside(point)
        assert directory.outcome(point) is None
        assert not directory.run_of(point).exists()
    kept = sorted((tmp_path / "abandoned").iterdir())
    assert [(path / "life").read_text() for path in kept] == ["0", "1"]


def test_versions_that_a_point_left_on_a_disk_make_room_too(tmp_path: Path) -> None:
    directory, point = SweepDirectory(tmp_path), Point(name="p", settings=())
    directory.run_of(point).mkdir(parents=True)
    disk = [f"weights.dir={tmp_path}/weights", "weights.transport=disk", "run.name=p"]
    (directory.run_of(point) / "recipe.yaml").write_text(to_yaml(load(ROOT / "recipes" / "quickstart.yaml", disk)))
    (tmp_path / "weights" / "p" / "v00000003").mkdir(parents=True)
    directory.set_aside(point)
    directory.set_aside(point)
    (kept,) = (tmp_path / "weights").iterdir()
    assert kept.name.startswith("p.abandoned") and (kept / "v00000003").is_dir()


def test_a_nodes_old_part_is_set_aside_and_a_new_run_on_a_shared_disk_is_not(tmp_path: Path) -> None:
    directory = SweepDirectory(tmp_path)
    (directory.runs / "old").mkdir(parents=True)
    (directory.runs / "old" / "recipe.node1.yaml").touch()
    (directory.runs / "new").mkdir()
    (directory.runs / "new" / "recipe.yaml").touch()
    for name in ("old", "new", "never"):
        directory.set_part_aside(name, node=1)
    assert [path.name for path in directory.runs.iterdir()] == ["new"]
    assert (tmp_path / "abandoned" / "old.1" / "recipe.node1.yaml").exists()


def test_a_file_that_is_no_plan_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"recipe": 3}')
    with pytest.raises(ValueError, match=r"sweep\.json.*not a sweep's plan"):
        SweepDirectory(tmp_path).read_plan()


def test_outcomes_come_back(tmp_path: Path) -> None:
    directory, point = SweepDirectory(tmp_path), Point(name="p", settings=())
    outcome = Outcome(state=State.TIMED_OUT, wall_s=2.5, reason="slow")
    directory.write_outcome(point, outcome)
    assert directory.outcome(point) == outcome
    assert msgspec.json.decode((tmp_path / "outcomes" / "p.json").read_bytes())["state"] == "timed out"
