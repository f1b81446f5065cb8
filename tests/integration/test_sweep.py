"""A real sweep of tiny runs: interrupted, taken up, one point failing; then its report. Alone and under torchrun."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.integration.runs import ROOT, finish, run_to_end, sessions, started, wait_until

GOOD, BAD = "reward.path=my.py-good", "reward.path=my.py-bad"
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    rows = [{"prompt": f"{a}+{a}=", "data_source": "s", "reward_model": {"ground_truth": str(a)}} for a in range(10)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my.py").write_text(
        textwrap.dedent("""
            def good(data_source, solution_str, ground_truth, extra_info=None):
                return 1.0
            def none(data_source, solution_str, ground_truth, extra_info=None):
                return 0.0
            def bad(data_source, solution_str, ground_truth, extra_info=None):
                raise RuntimeError("the moon is full")
        """)
    )
    (folder / "mine.yaml").write_text(
        textwrap.dedent(f"""
            run: {{name: sums, session_dir: {sessions(folder)}}}
            model: {{path: model, init: {{layers: 1, hidden_size: 32, intermediate_size: 64}}}}
            data: {{path: sums.jsonl}}
            reward: {{path: "my.py:good"}}
            rollout: {{max_tokens: 3, group_size: 4}}
            train: {{batch_groups: 4, steps: 3, learning_rate: 1e-3}}
        """)
    )
    return folder


def sweep(*arguments: str, recipe: str = "mine.yaml") -> list[str]:
    return [sys.executable, "-m", "flowrl", "sweep", recipe, *arguments]


SEED_THAT_DRAWS_GOOD_FIRST = "2"
REWARDS = ("reward.path=my.py:good,my.py:bad", "train.seed=0", "--out", "out")


@dataclass
class Lives:
    """What three lives of one sweep said: interrupted, taken up, with nothing left to do."""

    out: Path
    interrupted: tuple[int, str]
    resumed: tuple[int, str]
    idle: tuple[int, str]


@pytest.fixture(scope="module")
def lives(workplace: Path) -> Iterator[Lives]:
    first_run = workplace / "out" / "points" / GOOD / "events.jsonl"
    with started(sweep(*REWARDS), cwd=workplace) as process:
        wait_until(first_run.exists, 150, "the first point's run")
        os.kill(process.pid, signal.SIGINT)
        interrupted = finish(process, 100), process.returncode
    resumed = run_to_end(sweep(*REWARDS, "--jobs", "2"), cwd=workplace, timeout_s=200)
    idle = run_to_end(sweep(*REWARDS), cwd=workplace)
    yield Lives(workplace / "out", (interrupted[1], interrupted[0]), resumed, idle)


def test_an_interrupted_point_has_no_outcome_and_is_done_anew(lives: Lives) -> None:
    code, output = lives.interrupted
    assert code == 130, output
    assert f"{GOOD}: interrupted" in output
    assert (lives.out / "abandoned" / f"{GOOD}.1" / "events.jsonl").exists(), "what it left is kept"
    assert json.loads((lives.out / "outcomes" / f"{GOOD}.json").read_text())["state"] == "finished"
    assert json.loads((lives.out / "points" / GOOD / "summary.json").read_text())["steps"] == 3


def test_a_failed_point_is_kept_and_named_with_its_reason(lives: Lives) -> None:
    code, output = lives.resumed
    assert code == 1, output
    assert f"failed: {BAD}" in output
    outcome = json.loads((lives.out / "outcomes" / f"{BAD}.json").read_text())
    assert outcome["state"] == "failed"
    assert "the moon is full" in outcome["reason"]
    assert (lives.out / "logs" / f"{BAD}.log").stat().st_size > 0


def test_points_that_are_done_are_not_done_again(lives: Lives) -> None:
    code, output = lives.idle
    assert code == 1
    assert "started" not in output
    assert f"{GOOD}: finished earlier" in output and f"{BAD}: failed earlier" in output


def test_the_report_compares_what_ran_to_its_end(lives: Lives) -> None:
    code, output = run_to_end([sys.executable, "-m", "flowrl", "report", str(lives.out)])
    assert code == 1, "a failed point is no good end"
    lines = (lives.out / "points.csv").read_text().splitlines()
    rows = {row["point"]: row for row in csv.DictReader(lines)}
    assert rows[GOOD]["state"] == "finished" and rows[BAD]["state"] == "failed"
    assert float(rows[GOOD]["tokens_per_s"]) > 0
    for stage in ("rollout", "train", "reward", "advantage"):
        assert 0 <= float(rows[GOOD][f"idle_{stage}"]) <= 1
    page = (lives.out / "report.html").read_text()
    assert "the moon is full" in page and "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "")
    assert BAD in output


def test_a_point_that_takes_too_long_is_ended(workplace: Path) -> None:
    code, output = run_to_end(sweep("train.steps=100000", "--out", "slow", "--timeout", "1"), cwd=workplace)
    assert code == 1
    assert "timed out" in output and "not done after 1.0 s (--timeout)" in output
    assert not list(sessions(workplace).glob("*")), "nothing is left of it"


@pytest.mark.slow
def test_halving_ends_a_run_that_does_worse_and_keeps_its_figures(workplace: Path) -> None:
    pytest.importorskip("optuna", reason="optuna is an extra: flowrl[sweep]")
    search = (
        "--search",
        "halving",
        "--trials",
        "2",
        "--seed",
        SEED_THAT_DRAWS_GOOD_FIRST,
        "--metric",
        "critic/score/mean",
    )
    axes = ("reward.path=my.py:good,my.py:none", "train.steps=300")
    code, output = run_to_end(sweep(*axes, *search, "--min-updates", "3", "--out", "halved"), 200, cwd=workplace)
    assert code == 0, output
    outcomes = {path.stem: json.loads(path.read_text()) for path in (workplace / "halved" / "outcomes").iterdir()}
    assert outcomes[GOOD]["state"] == "finished"
    pruned = outcomes["reward.path=my.py-none"]
    assert pruned["state"] == "pruned" and pruned["reason"].startswith("given up at update")
    assert 3 <= int(pruned["reason"].split()[-1]) < 300
    assert not list(sessions(workplace).glob("*"))


@pytest.mark.slow
def test_a_random_search_does_what_it_drew_and_more_trials_add_to_it(workplace: Path) -> None:
    pytest.importorskip("optuna", reason="optuna is an extra: flowrl[sweep]")
    axes = ("train.learning_rate=1e-4..1e-2:log", "staleness.max=0..3", "train.steps=2", "--out", "drawn")
    search = ("--search", "random", "--seed", "3", "--trials")
    first, second, third = drawn_points(run_to_end(sweep(*axes, *search, "3", "--dry-run"), cwd=workplace))
    code, output = run_to_end(sweep(*axes, *search, "2"), 200, cwd=workplace)
    assert code == 0, output
    assert what_ran(workplace / "drawn") == [first, second]
    code, output = run_to_end(sweep(*axes, *search, "3"), 200, cwd=workplace)
    assert code == 0, output
    assert what_ran(workplace / "drawn") == [first, second, third]
    assert output.count("finished earlier") == 2 and not (workplace / "drawn" / "abandoned").exists(), output
    code, output = run_to_end([sys.executable, "-m", "flowrl", "report", str(workplace / "drawn")])
    assert code == 0, output
    rows = list(csv.DictReader((workplace / "drawn" / "points.csv").read_text().splitlines()))
    assert [row["state"] for row in rows] == ["finished"] * 3


def drawn_points(dry_run: tuple[int, str]) -> list[tuple[float, int]]:
    """(learning rate, staleness) of each, as a dry run lists them."""
    code, output = dry_run
    assert code == 0, output
    found = [dict(setting.split("=", 1) for setting in line.split()) for line in output.splitlines()]
    return [(float(point["train.learning_rate"]), int(point["staleness.max"])) for point in found]


def what_ran(out: Path) -> list[tuple[float, int]]:
    """(learning rate, staleness) of each run that trained both its updates, in the order in which they began."""
    runs = [
        path for path in (out / "points").iterdir() if json.loads((path / "summary.json").read_text())["steps"] == 2
    ]
    recipes = [yaml.safe_load((run / "recipe.yaml").read_text()) for run in sorted(runs, key=began)]
    return [(float(recipe["train"]["learning_rate"]), recipe["staleness"]["max"]) for recipe in recipes]


def began(run: Path) -> float:
    return float(json.loads((run / "lives.jsonl").read_text())["t"])


@pytest.mark.slow
def test_points_span_nodes_one_after_another_under_torchrun(workplace: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = ["-m", "flowrl", "sweep", "mine.yaml", "train.seed=0,1", "train.steps=2", "--out", "two"]
    code, output = run_to_end([*torchrun, *arguments], cwd=workplace, timeout_s=250)
    assert code == 0, output
    for seed in (0, 1):
        run = workplace / "two" / "points" / f"train.seed={seed}"
        assert json.loads((run / "summary.json").read_text())["steps"] == 2
        # Whichever engine is ready first may sample all that so short a run needs.
        assert {path.name for path in (run / "logs").glob("rollout.*")} == {"rollout.0.0.log", "rollout.1.0.log"}
    assert not list(sessions(workplace).glob("*"))


def test_a_mistake_in_any_point_starts_nothing(workplace: Path) -> None:
    done = subprocess.run(
        sweep("staleness.max=0,-1", "--out", "never"), cwd=workplace, capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert "point staleness.max=-1: staleness.max: -1; must be at least 0" in done.stderr
    assert not (workplace / "never").exists()
