"""`flowrl engines`: what it writes for a run's controller, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from controllers.wanted import WantedWorkers, read
from flowrl.cli.main import main
from flowrl.config import load, to_yaml

ROOT = Path(__file__).resolve().parents[2]


def run_of(directory: Path, *overrides: str) -> Path:
    recipe = load(ROOT / "recipes" / "quickstart.yaml", list(overrides))
    (directory / "recipe.yaml").write_text(to_yaml(recipe))
    return directory


def test_a_controller_hears_of_its_own_node_once(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    (run / "recipe.node1.yaml").write_text((run / "recipe.yaml").read_text())
    assert WantedWorkers(run, 0).news() == {}
    assert main(["engines", str(run), "3"]) == 0 and main(["engines", str(run), "0", "--node", "1"]) == 0
    assert read(run) == {"rollout": {"0": 3, "1": 0}}
    assert [WantedWorkers(run, node).news() for node in (0, 1, 2)] == [{"rollout": 3}, {"rollout": 0}, {}]
    patient = WantedWorkers(run, 0)
    assert patient.news() == {"rollout": 3}
    patient._looked_at -= 1
    assert patient.news() == {}, "nothing has changed"


def test_engines_of_a_producer_are_counted_by_its_name(tmp_path: Path) -> None:
    run = run_of(tmp_path, "producers={more: {pool: rollout}}")
    assert main(["engines", str(run), "2"]) == 0 and main(["engines", str(run), "3", "--stage", "more"]) == 0
    assert read(run) == {"rollout": {"0": 2}, "more": {"0": 3}}


def test_a_run_that_has_trained_to_its_end_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path)
    (run / "model").mkdir()
    assert main(["engines", str(run), "2"]) != 0
    assert "has trained to its end" in capsys.readouterr().err
    assert read(run) == {}


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        ([], ["2", "--node", "1"], "has no recipe.node1.yaml"),
        ([], ["1", "--stage", "train"], "stage: 'train'; must be one of rollout"),
        ([], ["-1"], "count: -1; must be from 0 to"),
        (["pools.rollout.devices=[cuda:0,cuda:1]", "pools.rollout.workers=2"], ["3"], "count: 3; must be from 0 to 2"),
        (["rollout.handover=batch"], ["2"], "count: 2; engines cannot join or leave this run"),
        (
            ["pools={rollout: {devices: [cpu:0]}, train: {devices: [cpu:0]}}", "staleness.max=0"],
            ["2"],
            "count: 2; engines cannot join or leave this run",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], arguments: list[str], message: str
) -> None:
    run = run_of(tmp_path, *overrides)
    assert main(["engines", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (run / "workers.json").exists()
