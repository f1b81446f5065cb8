"""Time to the same reward: FlowRL and TRL on one model, task, reward, batch and seed, one after the other.

    python benchmarks/time_to_reward.py --trl-python TRL/bin/python [--target 0.86] [--out RESULT.json]

First the quickstart's warm start makes the model that both begin with. FlowRL then runs the quickstart from there, and
TRL its half (time_to_reward_trl.py says how its environment is made). The clock of the training loop starts with the
first update and stops at the version whose greedy accuracy on the held-out prompts first reaches the target; both look
every 50 updates. TRL's evaluations are taken off its clock; FlowRL's run beside its training and stay on it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "quickstart.yaml"
EVALUATE_EVERY = 50


def main() -> None:
    given = parse()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = warm_started_model(work, given.seed)
        ours = measure_flowrl(work, model, given)
        theirs = measure_trl(work, model, given)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "commit": commit(),
        "target": given.target,
        "seed": given.seed,
        "flowrl": ours,
        "trl": theirs,
        "ratio_loop": ratio(ours["loop_s"], theirs["loop_s"]),
        "ratio_with_startup": ratio(total(ours), total(theirs)),
    }
    print(json.dumps(result, indent=2))
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, required=True, help="interpreter of the environment that has TRL")
    parser.add_argument("--trl-threads", type=int, default=2, help="that TRL's torch computes with")
    parser.add_argument("--target", type=float, default=0.86, help="greedy accuracy on the held-out prompts")
    parser.add_argument("--max-steps", type=int, default=1000, help="updates after which either gives up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the result goes as JSON")
    return parser.parse_args()


def flowrl(*overrides: str) -> None:
    command = [sys.executable, "-m", "flowrl", "run", str(RECIPE), *overrides]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def warm_started_model(work: Path, seed: int) -> Path:
    flowrl(
        "run.name=warm", f"run.dir={work}", f"model.path={work}/fresh", "eval=null", "train.steps=1",
        f"train.seed={seed}",
    )  # fmt: skip
    return work / "warm" / "warm_start"


def measure_flowrl(work: Path, model: Path, given: argparse.Namespace) -> dict[str, Any]:
    launched = time.time()
    flowrl(
        "run.name=ours", f"run.dir={work}", f"model={{path: {model}}}", "model.init=null", "warm_start=null",
        f"eval.every={EVALUATE_EVERY}", f"train.steps={given.max_steps}", f"train.seed={given.seed}",
    )  # fmt: skip
    summary = json.loads((work / "ours" / "summary.json").read_text())
    published = {
        event["version"]: event["t"]
        for line in (work / "ours" / "events.jsonl").open(encoding="utf-8")
        if '"published"' in line
        for event in [json.loads(line)]
    }
    accuracies = {int(version): accuracy for version, accuracy in summary["accuracy_by_version"].items()}
    reached = min((version for version, accuracy in accuracies.items() if accuracy >= given.target), default=None)
    return {
        "startup_s": round(published[0] - launched, 2),
        "steps": reached,
        "loop_s": None if reached is None else round(published[reached] - published[0], 2),
        "seconds_per_step": round((published[given.max_steps] - published[0]) / given.max_steps, 4),
        "accuracy": accuracies.get(reached if reached is not None else given.max_steps),
    }


def measure_trl(work: Path, model: Path, given: argparse.Namespace) -> dict[str, Any]:
    from flowrl.config import load
    from flowrl.data.datasets import load_splits, save_file

    recipe = load(RECIPE)
    splits = load_splits(recipe.data, recipe.eval)
    save_file(work / "train.jsonl", splits.train)
    save_file(work / "held_out.jsonl", splits.held_out)
    command = [
        str(given.trl_python), str(ROOT / "benchmarks" / "time_to_reward_trl.py"),
        "--model", str(model), "--train", str(work / "train.jsonl"), "--held-out", str(work / "held_out.jsonl"),
        "--out", str(work / "trl.json"), "--target", str(given.target), "--max-steps", str(given.max_steps),
        "--evaluate-every", str(EVALUATE_EVERY), "--threads", str(given.trl_threads), "--seed", str(given.seed),
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    measured = json.loads((work / "trl.json").read_text())
    return {
        "startup_s": measured["startup_s"],
        "steps": measured["steps_to_target"],
        "loop_s": measured["loop_s_to_target"],
        "seconds_per_step": measured["seconds_per_step"],
        "accuracy": measured["accuracy"][-1]["accuracy"],
        "threads": given.trl_threads,
        "versions": measured["versions"],
    }


def total(measured: dict[str, Any]) -> float | None:
    return None if measured["loop_s"] is None else measured["startup_s"] + measured["loop_s"]


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """None where one of the two did not reach the target."""
    return None if ours is None or theirs is None else round(ours / theirs, 3)


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
