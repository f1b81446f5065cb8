"""The command line as a user meets it: real processes, exit codes, one message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")


def flowrl(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flowrl", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env={**os.environ, **environment},
    )


def test_help_names_the_commands() -> None:
    done = flowrl("--help")
    assert done.returncode == 0
    for command in ("run", "sweep", "graph", "report", "doctor", "init-model"):
        assert command in done.stdout


def test_no_command_shows_help_and_fails() -> None:
    done = flowrl()
    assert done.returncode == 2
    assert "COMMAND" in done.stdout


def test_dry_run_shows_recipe_graph_and_placement_and_starts_nothing(tmp_path: Path) -> None:
    done = flowrl("run", QUICKSTART, "staleness.max=5", "--dry-run", f"run.dir={tmp_path}/runs")
    assert done.returncode == 0, done.stderr
    assert "max: 5" in done.stdout
    assert "rollout" in done.stdout and "advantage" in done.stdout
    assert "train.0.0" in done.stdout
    assert f"{tmp_path}/runs/quickstart, which holds no run yet" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_dry_run_says_that_a_run_of_this_name_is_there(tmp_path: Path) -> None:
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    (tmp_path / "runs" / "quickstart" / "recipe.yaml").touch()
    done = flowrl("run", QUICKSTART, "--dry-run", f"run.dir={tmp_path}/runs")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/runs/quickstart holds a run already" in done.stdout and "--resume" in done.stdout
    done = flowrl("run", QUICKSTART, "--dry-run", "--resume", f"run.dir={tmp_path}/runs")
    assert f"{tmp_path}/runs/quickstart, whose run goes on" in done.stdout


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("staleness.mx=3", ["staleness.mx", "3", "did you mean staleness.max?"]),
        ("train.steps=abc", ["train.steps", "abc"]),
        ("pools.rollout.nodes=[4]", ["pools.rollout.nodes", "4", "rollout"]),
        ("eval.path=/nowhere", ["eval.path", "/nowhere", "no such file"]),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(override: str, parts: list[str]) -> None:
    done = flowrl("run", QUICKSTART, override)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert all(part in done.stderr for part in parts), done.stderr


def test_a_circle_of_stages_is_refused_by_name() -> None:
    done = flowrl(
        "run",
        QUICKSTART,
        "stages.a={run: 'json:dumps', reads: [y], writes: [x]}",
        "stages.b={run: 'json:loads', reads: [x], writes: [y]}",
    )
    assert done.returncode == 2
    assert "a -> b" in done.stderr or "b -> a" in done.stderr


@pytest.mark.parametrize("package", ["controllers", "transfer_queue"])
def test_a_foreign_package_of_our_name_is_refused_with_its_path(tmp_path: Path, package: str) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("")
    done = flowrl("run", QUICKSTART, "--dry-run", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert str(tmp_path / package) in done.stderr


def test_graph_draws_mermaid() -> None:
    done = flowrl("graph", QUICKSTART, "--mermaid")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("flowchart")


def test_graph_says_who_shares_devices() -> None:
    done = flowrl("graph", str(ROOT / "recipes" / "colocated.yaml"), "--nodes", "2")
    assert done.returncode == 0, done.stderr
    assert "rollout and train: colocated" in done.stdout
    assert "  node 1: rollout.1.0 and train.1.0 take turns at cpu:0" in done.stdout


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "flowrl", "graph", QUICKSTART], stdout=writer, stderr=subprocess.PIPE, text=True,
        timeout=60, cwd=ROOT, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
