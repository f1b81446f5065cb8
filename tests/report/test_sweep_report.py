"""A sweep's report: figures from what runs left, compared by axis, seeds together, failures named and left out."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image, pyplot

from flowrl.cli.main import main
from flowrl.report.events import Event
from flowrl.report.idle import rollout_idle_share
from flowrl.report.point_figures import trailing_mean
from flowrl.report.sweep_report import print_sweep_report, summary
from flowrl.report.sweep_table import read_sweep
from flowrl.sweep.axes import grid, parse_axes
from flowrl.sweep.directory import Outcome, Plan, State, SweepDirectory

UPDATES = 40
STEP_S = {"0": 1.0, "2": 0.5}


def write_run(run: Path, step_s: float, seed: int) -> None:
    """A reward that grows by 0.02 an update; the trainer waits for a quarter of the time, rollout idles for a half."""
    run.mkdir(parents=True)
    metrics, events = [], []
    for step in range(1, UPDATES + 1):
        t = 3.0 + step * step_s
        metrics.append({
            "t": t, "step": step, "node": 0, "worker": "train.0.0", "critic/score/mean": 0.02 * step,
            "timing_s/step": step_s, "timing_s/wait_for_rows": step_s / 4, "perf/total_num_tokens": 100,
        })  # fmt: skip
        row = {"node": 0, "key": ["train", step, 0, 0]}
        events += [
            {"t": t - step_s, "kind": "dispatched", "version": step - 1, **row},
            {"t": t - step_s / 2, "kind": "sampled", "versions": [[step - 1, 5]], **row},
            {"t": t, "kind": "trained", "update": step - 1, **row},
        ]
    # Before the first update the stage has nothing to do, and that does not count.
    for t, idle_s, span_s in ((1.0, 10.0, 10.0), (20.0, 8.0, 10.0), (40.0, 10.0, 10.0)):
        metrics.append({"t": t, "step": None, "perf/idle_s/reward": idle_s, "perf/span_s/reward": span_s})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in events))
    (run / "summary.json").write_text(json.dumps({"accuracy_before": 0.1, "accuracy_after": 0.8 + 0.1 * seed}))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two values by two seeds; one point has failed with figures that would spoil the comparison, one is not done."""
    axes = parse_axes(["staleness.max=2,0", "train.seed=0,1", "train.steps=40"])
    points = grid(axes)
    directory = SweepDirectory(tmp_path)
    fields = tuple(axis.field for axis in axes)
    plan = Plan(
        recipe="r.yaml", fields=fields, rest_hash="h", search="grid", metric="accuracy", goal="maximize",
        points=(*points, *grid(parse_axes(["staleness.max=4", "train.seed=0,1", "train.steps=40"]))),
    )  # fmt: skip
    directory.write_plan(plan)
    for point in points:
        eta, seed = point.settings[0][1], int(point.settings[1][1])
        write_run(directory.run_of(point), STEP_S[eta], seed)
        directory.write_outcome(point, Outcome(state=State.FINISHED, wall_s=9.0))
    failed = plan.points[4]
    write_run(directory.run_of(failed), 77.0, 5)
    directory.write_outcome(failed, Outcome(state=State.FAILED, wall_s=1.0, reason="<the moon> is full"))
    return tmp_path


def test_figures_are_those_of_the_runs(sweep: Path) -> None:
    table = read_sweep(sweep, reward=0.4)
    figures = {row.point.settings[:2]: row.figures for row in table.rows}
    slow = figures[("staleness.max", "0"), ("train.seed", "1")]
    assert slow is not None
    assert slow.updates == UPDATES
    assert slow.accuracy_after == pytest.approx(0.9)
    assert slow.training_s == pytest.approx(40.0)
    assert slow.tokens_per_s == pytest.approx(100.0)
    assert slow.idle == pytest.approx({"train": 0.25, "rollout": 0.5, "reward": 0.9})
    assert slow.reward_final == pytest.approx(0.02 * np.mean([37, 38, 39, 40]))
    # The mean of ten updates passes 0.4 when the middle of the ten is past update 20: at update 25.
    assert slow.seconds_to(0.4) == pytest.approx(25.0)
    fast = figures[("staleness.max", "2"), ("train.seed", "0")]
    assert fast is not None and fast.seconds_to(0.4) == pytest.approx(12.5)
    assert fast.seconds_to(0.9) is None


def test_seeds_are_gathered_and_what_did_not_finish_is_left_out(sweep: Path) -> None:
    header, rows = summary(read_sweep(sweep, reward=0.4), "staleness.max")
    assert header[:4] == ["staleness.max", "points", "accuracy", "reward"]
    assert [row[:3] for row in rows] == [["0", "2", "0.85 ±0.071"], ["2", "2", "0.85 ±0.071"]]
    assert [row[4] for row in rows] == ["25 ±0", "12.5 ±0"]


def test_without_a_reward_named_the_time_is_to_one_that_all_reached(sweep: Path) -> None:
    table = read_sweep(sweep, reward=None)
    assert table.reward == pytest.approx(0.63)  # nine tenths of the last ten updates' mean, 0.71
    assert all(row.figures and row.figures.seconds_to(0.63) for row in table.compared())


def test_page_pictures_and_csv_are_written(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not print_sweep_report(sweep, axis=None, reward=None), "a failed point, and one not done, are no good end"
    said = capsys.readouterr().out
    assert "failed: <the moon> is full" in said and "not done" in said
    for name in ("accuracy", "reward", "time_to_reward", "throughput", "idle", "curves"):
        picture = image.imread(sweep / "pictures" / f"{name}.png")
        assert picture.shape[1] > picture.shape[0] > 300
    assert not pyplot.get_fignums(), "figures are closed"
    lines = list(csv.DictReader((sweep / "points.csv").read_text().splitlines()))
    assert [line["state"] for line in lines] == ["finished"] * 4 + ["failed", "not done"]
    assert {line["train.steps"] for line in lines} == {"40"}
    assert lines[5]["accuracy_after"] == ""
    page = (sweep / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    assert "&lt;the moon&gt; is full" in page and "<the moon>" not in page
    assert 'src="http' not in page and "<script" not in page


def test_another_axis_may_be_asked_for_but_only_one_that_varies(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(sweep), "--x", "train.seed"]) == 1
    assert "train.seed" in capsys.readouterr().out
    assert main(["report", str(sweep), "--x", "train.steps"]) == 2
    assert (
        "--x: 'train.steps'; does not vary in this sweep; what does: staleness.max, train.seed"
        in capsys.readouterr().err
    )


def test_options_of_sweeps_are_refused_for_a_run(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = next((sweep / "points").iterdir())
    assert main(["report", str(run), "--reward", "0.5"]) == 2
    assert "--reward: 0.5; is for sweeps" in capsys.readouterr().err


def event(kind: str, t: float, node: int = 0) -> Event:
    return Event(kind=kind, t=t, node=node, key=("train", 0, 0, 0))


def test_rollout_idles_only_while_none_of_a_nodes_rows_is_sampled() -> None:
    overlapping = [event("dispatched", 0), event("dispatched", 1), event("sampled", 2), event("sampled", 4)]
    assert rollout_idle_share([*overlapping, event("trained", 4)]) == 0.0
    assert rollout_idle_share([*overlapping, event("trained", 8)]) == pytest.approx(0.5)
    other = [event("dispatched", 0, node=1), event("sampled", 8, node=1)]
    assert rollout_idle_share([*other, *overlapping, event("trained", 8)]) == pytest.approx(0.25), "mean over nodes"
    shuffled = [event("trained", 8), *reversed(overlapping)]
    assert rollout_idle_share(shuffled) == pytest.approx(0.5), "lines come in any order"
    lost = [event("dispatched", 0), event("lost", 2), event("trained", 4)]
    assert rollout_idle_share(lost) == pytest.approx(0.5)
    assert rollout_idle_share([event("trained", 1)]) is None


@pytest.mark.parametrize("length", [0, 1, 9, 10, 11, 300])
def test_a_trailing_mean_is_that_of_the_last_ten(length: int) -> None:
    values = np.random.default_rng(length).random(length)
    slow = [values[max(0, end - 10) : end].mean() for end in range(1, length + 1)]
    assert np.allclose(trailing_mean(values), slow)
