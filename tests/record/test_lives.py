"""What a run's directory says of its lives, and what a later life may change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from controllers.topology import Topology
from flowrl.config import Recipe, load
from flowrl.record import run_directory
from flowrl.record.lives import (
    Life,
    is_started_again,
    lives,
    newest_checkpoint,
    next_life,
    note_launcher,
    note_life,
)
from tests.integration.runs import ROOT


def recipe(directory: Path, *overrides: str) -> Recipe:
    return load(ROOT / "recipes/quickstart.yaml", [f"run.dir={directory}", "run.name=x", *overrides])


def begin(directory: Path, checkpoints: tuple[int, ...] = ()) -> Path:
    """A run in its first life, with metrics of five updates."""
    run, _ = run_directory.create(recipe(directory), 0)
    note_life(run, Life(number=0))
    for step in checkpoints:
        (run / "checkpoints" / f"step_{step}").mkdir(parents=True)
    reports = [{"t": 0.5, "step": None, "worker": "train.0.0"}] + [{"t": step, "step": step} for step in range(1, 6)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(report) + "\n" for report in reports) + '{"torn')
    return run


def test_a_life_begins_at_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    run = begin(tmp_path, (2, 4))
    (run / "checkpoints" / ".new-step_6").mkdir()
    assert next_life(recipe(tmp_path), run, 0) == Life(number=1, step=4, restore_from="checkpoints/step_4")
    assert [life["step"] for life in lives(run)] == [0, 4]
    assert next_life(recipe(tmp_path), run, 0).number == 2


def controller(local_node: int, restart: int = 0) -> Topology:
    """One of two that one torchrun has started on this machine."""
    variables = {"RANK": local_node, "WORLD_SIZE": 2, "LOCAL_RANK": local_node, "LOCAL_WORLD_SIZE": 2}
    more = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500, "TORCHELASTIC_RESTART_COUNT": restart}
    return Topology.from_environment({name: str(value) for name, value in (variables | more).items()})


def test_only_a_controller_that_its_torchrun_has_started_before_is_started_again(tmp_path: Path) -> None:
    assert not is_started_again(tmp_path / "runs", controller(0, restart=1)), "there is nothing to go on with"
    run = begin(tmp_path)
    assert not is_started_again(run, controller(0)), "another start has left it"
    note_launcher(run, controller(0))
    assert is_started_again(run, controller(0)), "though torchrun has not counted it"
    assert not is_started_again(run, controller(1)), "it is the first time that this one is started"
    assert not is_started_again(run, controller(1, restart=1)), "a refused start is counted too"
    note_launcher(run, controller(1))
    assert is_started_again(run, controller(1, restart=1))
    note_launcher(run, Topology())
    assert not is_started_again(run, Topology()), "without torchrun a run goes on only when it is told to"


def test_without_a_checkpoint_it_begins_anew(tmp_path: Path) -> None:
    run = begin(tmp_path)
    (run / "warm_start").mkdir()
    assert newest_checkpoint(run) == (0, "")
    assert next_life(recipe(tmp_path), run, 0) == Life(number=1)
    assert not (run / "warm_start").exists()


def test_versions_on_disk_of_another_run_of_the_name_are_not_written_among(tmp_path: Path) -> None:
    disk = (f"weights.dir={tmp_path}/weights", "weights.transport=disk")
    (tmp_path / "weights" / "x" / "v00000007").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^weights\.dir: .*weights/x' holds versions of another run of this name"):
        run_directory.create(recipe(tmp_path, *disk), 0)
    assert not (tmp_path / "x").exists()
    run_directory.create(recipe(tmp_path, *disk), 1)  # node 0 may have begun to publish


def test_who_repeats_a_run_by_disk_hears_of_the_run_and_not_of_its_versions(tmp_path: Path) -> None:
    disk = (f"weights.dir={tmp_path}/weights", "weights.transport=disk")
    run_directory.create(recipe(tmp_path, *disk), 0)
    (tmp_path / "weights" / "x" / "v00000007").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds a run already, .* go on with it by --resume"):
        run_directory.create(recipe(tmp_path, *disk), 0)


def test_a_resumed_run_that_turns_to_a_disk_does_not_write_among_a_namesakes_versions(tmp_path: Path) -> None:
    run = begin(tmp_path)
    disk = (f"weights.dir={tmp_path}/weights", "weights.transport=disk")
    (tmp_path / "weights" / "x" / "v00000007").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^weights\.dir: .* holds versions of another run"):
        next_life(recipe(tmp_path, *disk), run, 0)


def test_metrics_keep_only_the_updates_that_count(tmp_path: Path) -> None:
    run = begin(tmp_path, (2,))
    next_life(recipe(tmp_path), run, 0)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [None, 1, 2]


def test_where_a_run_goes_on_may_change_and_its_recipes_are_kept(tmp_path: Path) -> None:
    run = begin(tmp_path, (2,))
    changed = recipe(tmp_path, "train.steps=2000", "rollout.concurrency=7", "pools.rollout.workers=3")
    next_life(changed, run, 0)
    assert load(run / "recipe.yaml") == changed
    assert load(run / "recipe.life0.yaml") == recipe(tmp_path)


@pytest.mark.parametrize(
    "override", ["train.learning_rate=1.0", "staleness.max=4", "algorithm.clip_low=0.1", "data.seed=3"]
)
def test_what_a_run_computes_may_not_change(tmp_path: Path, override: str) -> None:
    run = begin(tmp_path, (2,))
    name, _, value = override.partition("=")
    with pytest.raises(ValueError, match=rf"^{name}: '?{value}'?; the run to be resumed has"):
        next_life(recipe(tmp_path, override), run, 0)
    assert len(lives(run)) == 1


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.name: 'x'; .* holds no run to resume"):
        next_life(recipe(tmp_path), tmp_path / "x", 0)


def test_a_run_goes_on_by_itself_only_under_the_torchrun_that_began_it(tmp_path: Path) -> None:
    ours, another = Topology(launcher="host 7 100"), Topology(launcher="host 7 200")
    assert not is_started_again(tmp_path / "x", ours), "there is no run yet"
    run = begin(tmp_path)
    note_launcher(run, ours)
    note_launcher(run, ours)
    assert (run / "launchers").read_text() == "host 7 100\n"
    assert is_started_again(run, ours), "though torchrun has not counted it"
    assert not is_started_again(run, another)
    assert not is_started_again(run, Topology()), "without torchrun"


def test_a_node_whose_disk_is_not_that_of_node_0_is_refused_by_name(tmp_path: Path) -> None:
    run, _ = run_directory.create(recipe(tmp_path), 1)
    with pytest.raises(ValueError, match=r"run\.dir: .* has no recipe\.yaml, so node 0 has it on another disk"):
        next_life(recipe(tmp_path), run, 1)
