from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image, pyplot

from flowrl.report.curves import accuracy_by_version, smooth
from flowrl.report.record import RunRecord
from flowrl.report.run_report import print_report


def metric(t: float, step: int | None, **values: float) -> str:
    named = {name.replace("__", "/"): value for name, value in values.items()}
    return json.dumps({"t": t, "step": step, "node": 0, "worker": "train", **named}) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    lines = [
        metric(5 + step, step, critic__score__mean=step / 20, response_length__mean=5, timing_s__update_actor=0.1)
        for step in range(1, 21)
    ]
    lines.append(json.dumps({"t": 40, "step": 20, "node": 0, "worker": "e", "val-core/sums/acc/mean@1": 0.9}) + "\n")
    lines.append(json.dumps({"t": 6, "step": 0, "node": 0, "worker": "e", "val-core/sums/acc/mean@1": 0.3}) + "\n")
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"t": 41, "st')
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 20, "rl_s": 20.0, "accuracy_before": 0.3}))
    row = {"t": 1.0, "node": 0, "key": ["train", 0, 0, 0]}
    events = [
        {"kind": "sampled", "versions": [[0, 3]]},
        {"kind": "taken", "update": 1},
        {"kind": "trained", "update": 1},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row | event) + "\n" for event in events))
    (tmp_path / "recipe.yaml").write_text("staleness: {max: 1}\n")
    return tmp_path


def test_a_run_is_drawn_checked_and_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_report(run)
    said = capsys.readouterr().out
    assert "staleness of rows taken: 1: 1 (bound 1)" in said
    assert "accuracy_before  0.3" in said
    picture = image.imread(run / "curves.png")
    assert picture.shape[1] > picture.shape[0] > 500
    assert not pyplot.get_fignums(), "figures are closed"


def test_the_page_of_a_run_needs_nothing_else(run: Path) -> None:
    sample = {"group": 3, "reward": 1.0, "prompt": "<1+1", "response": "2", "ground_truth": "2"}
    (run / "samples.jsonl").write_text((json.dumps(sample) + "\n") * 30 + '{"group": 4, "rew')
    assert print_report(run)
    page = (run / "report.html").read_text()
    assert page.count("&lt;1+1") == 12, "the last samples, as text"
    assert "data:image/png;base64," in page and "staleness: {max: 1}" in page
    assert "Staleness check: nothing wrong" in page
    assert "<script" not in page and 'src="http' not in page


def test_a_violation_is_told_and_returned(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "recipe.yaml").write_text("staleness: {max: 0}\n")
    assert not print_report(run)
    assert "staleness 1 above the bound 0" in capsys.readouterr().out


def test_a_run_that_left_nothing_is_drawn_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_report(tmp_path)
    assert (tmp_path / "curves.png").is_file()
    assert "staleness was not checked" in capsys.readouterr().out


def test_a_line_cut_off_at_the_end_is_left_out(run: Path) -> None:
    record = RunRecord.read(run)
    assert len(record.lines) == 22
    assert record.series("critic/score/mean").step.tolist() == list(range(1, 21))
    assert len(record.series("no/such/metric")) == 0


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^run: .*no such directory"):
        print_report(tmp_path / "missing")


@pytest.mark.parametrize("length", [1, 2, 3, 30, 1000])
def test_smoothing_keeps_length_and_a_constant(length: int) -> None:
    assert np.allclose(smooth(np.full(length, 0.7)), 0.7)


def test_an_accuracy_stands_at_the_time_when_training_reached_its_version(run: Path) -> None:
    accuracy = accuracy_by_version(RunRecord.read(run))
    assert accuracy.step.tolist() == [0, 20]
    assert accuracy.t.tolist() == [6, 25]
    assert accuracy.value.tolist() == [0.3, 0.9]
