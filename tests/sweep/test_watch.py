"""A run's metrics are followed while they are written."""

from __future__ import annotations

import json
from pathlib import Path

from flowrl.sweep.watch import Watch


def line(step: int | None, **values: float) -> str:
    return json.dumps({"t": 1.0, "step": step, **{name.replace("__", "/"): value for name, value in values.items()}})


def test_each_line_is_heard_once_and_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    watch = Watch(path, "critic/score/mean")
    assert watch.reports() == []
    first, second = line(1, critic__score__mean=0.25) + "\n", line(2, critic__score__mean=0.75) + "\n"
    path.write_text(first + second[:20])
    assert watch.reports() == [(1, 0.25)]
    assert (watch.step, watch.reward) == (1, 0.25)
    path.write_text(first + second)
    assert watch.reports() == [(2, 0.5)], "the mean of the last values"
    assert watch.reports() == []


def test_a_metric_is_averaged_over_ten_values_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line(step, actor__entropy=float(step)) + "\n" for step in range(1, 21)))
    assert Watch(path, "actor/entropy").reports()[-1] == (20, 15.5)


def test_an_accuracy_of_zero_is_an_accuracy(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    name = "val-core/sums/acc/mean@1"
    path.write_text(
        "".join(json.dumps({"t": 1, "step": step, name: value}) + "\n" for step, value in ((0, 0.5), (5, 0.0)))
    )
    watch = Watch(path, "accuracy")
    assert watch.reports() == [(0, 0.5), (5, 0.0)]
    assert watch.accuracy == 0.0
