"""Asynchronous against synchronous training where responses have a long tail: wall time, idle stages, and the bound.

    python benchmarks/async_vs_sync.py [--updates 60] [--modes 0,1,2,2:drop,4,4:drop] [--out RESULT.json]

The same model, prompts, batch and number of samples in every mode; rollout has one core and the trainer has one.
Lengths are log-normal (median --median tokens, deviation --sigma of their logarithm, cut at --longest) and follow from
a sample's own seed, so that every mode draws the same ones. Beside each measured gain over η = 0 stands its bound: the
same number of updates under a virtual clock, by the queue's own shards and ledger (`flowrl/simulate`), with the
times that the run of that mode measured: of responses, of the trainer, which begins when a micro-batch is full, and
from a version's publishing to the first response under it. Nothing else takes time there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 5
SIMULATED_UPDATES = 200
SIMULATIONS = 3


async def long_tail(context: Any) -> Any:
    """An episode of one turn whose length is drawn, not chosen by the model."""
    request = context.request
    dice = np.random.default_rng(request.sampling.seed)
    median, sigma = float(os.environ["LONG_TAIL_MEDIAN"]), float(os.environ["LONG_TAIL_SIGMA"])
    length = min(
        request.sampling.max_tokens, max(1, round(math.exp(math.log(median) + sigma * dice.standard_normal())))
    )
    sampling = dataclasses.replace(request.sampling, max_tokens=length, stop_token_ids=())
    transcript = context.begin()
    transcript.write(await context.engine.generate(dataclasses.replace(request, sampling=sampling)))
    return transcript.trajectory()


def main() -> None:
    sys.path[0] = str(ROOT)  # some benchmarks in this folder have the names of packages
    given = parse()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        measured = []
        for mode in given.modes.split(","):
            measured.append(measure(work, mode, given))
            print(json.dumps(measured[-1]), flush=True)
    base = measured[0]
    for each in measured:
        each["gain"] = round(base["update_s"] / each["update_s"], 3)
        each["bound"] = round(base["simulated_update_s"] / each["simulated_update_s"], 3)
        each["gain_over_bound"] = round(each["gain"] / each["bound"], 3)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "load_before": os.getloadavg()[0],
        "settings": {name: value for name, value in vars(given).items() if name != "out"},
        "modes": measured,
    }
    print("\n" + tables(measured))
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--modes", default="0,1,2,2:drop,4,4:drop", help="staleness.max, and :drop; the first is the base"
    )
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--batch-groups", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--concurrency", type=int, default=32, help="groups that the engine works on at once")
    parser.add_argument("--median", type=float, default=24.0, help="tokens")
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--longest", type=int, default=192, help="tokens")
    parser.add_argument("--hidden", type=int, default=128, help="of the model; it sets what a token costs")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where the result goes as JSON")
    return parser.parse_args()


def overrides(work: Path, mode: str, given: argparse.Namespace) -> list[str]:
    bound, _, late = mode.partition(":")
    return [
        "warm_start=null", "eval=null", "run.checkpoint_every=0", f"run.dir={work}", f"run.name=mode-{bound}{late}",
        f"model.path={work}/model", f"model.init.hidden_size={given.hidden}", f"model.init.layers={given.layers}",
        f"model.init.max_tokens={64 + given.longest}", f"train.steps={given.updates}", "train.learning_rate=1e-6",
        f"train.batch_groups={given.batch_groups}", f"rollout.group_size={given.group_size}",
        f"rollout.concurrency={given.concurrency}", f"rollout.max_tokens={given.longest}", "data.size=5000",
        f"rollout.episode={Path(__file__).resolve()}:long_tail", "algorithm.skip_tied=false",
        f"staleness.max={bound}", f"staleness.late={late or 'wait'}", "pools.rollout.threads=1",
        "pools.train.threads=1",
    ]  # fmt: skip


def measure(work: Path, mode: str, given: argparse.Namespace) -> dict[str, Any]:
    from flowrl.report.events import read_events
    from flowrl.report.idle import mapped_idle_shares, rollout_idle_share, train_idle_share
    from flowrl.report.record import RunRecord

    settings = overrides(work, mode, given)
    command = [sys.executable, "-m", "flowrl", "run", str(ROOT / "recipes" / "quickstart.yaml"), *settings]
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT),
        "LONG_TAIL_MEDIAN": str(given.median), "LONG_TAIL_SIGMA": str(given.sigma),
    }  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"mode {mode}: exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    bound, _, late = mode.partition(":")
    run = work / f"mode-{bound}{late}"
    published: dict[int, float] = {}
    dropped = 0
    for event in read_events(run / "events.jsonl"):
        dropped += event.kind == "dropped"
        if event.kind == "published" and event.version is not None:
            published.setdefault(event.version, event.t)
    seconds = [published[version + 1] - published[version] for version in range(WARM_UP, given.updates)]
    record = RunRecord.read(run)
    began = record.series("critic/score/mean").t[0] if len(record.series("critic/score/mean")) else 0.0
    return {
        "mode": mode,
        "update_s": round(statistics.mean(seconds), 4),
        "training_s": round(published[given.updates] - published[0], 2),
        "idle_rollout": round(rollout_idle_share(read_events(run / "events.jsonl")) or 0.0, 3),
        "idle_train": round(train_idle_share(record) or 0.0, 3),
        **{f"idle_{name}": round(share, 3) for name, share in mapped_idle_shares(record, began).items()},
        "tokens_a_response": round(float(record.series("response_length/mean").value.mean()), 1),
        "rows_dropped": dropped,
        "max_staleness": record.summary["max_staleness"],
        **simulated(run, settings),
    }


def simulated(run: Path, settings: list[str]) -> dict[str, float]:
    """Virtual seconds an update in the same mode, with the times of `run`."""
    from flowrl.config import load
    from flowrl.simulate import simulate
    from flowrl.simulate.of_run import measured_times, setting_of_recipe

    recipe = load(ROOT / "recipes" / "quickstart.yaml", settings)
    setting = setting_of_recipe(recipe)
    times = measured_times(run, setting.batch_rows, recipe.train.micro_batch_tokens)
    outcomes = [
        simulate(dataclasses.replace(setting, updates=SIMULATED_UPDATES, seed=seed, **times))  # type: ignore[arg-type]
        for seed in range(SIMULATIONS)
    ]
    responses = times["durations"].seconds  # type: ignore[attr-defined]
    busy_s = float(times["row_train_s"]) * setting.batch_rows + float(times["step_s"])  # type: ignore[arg-type]
    return {
        "response_s_median": round(statistics.median(responses), 4),
        "response_s_p99": round(float(np.quantile(responses, 0.99)), 4),
        "train_busy_s": round(busy_s, 4),
        "simulated_update_s": round(setting.batch_rows / statistics.mean(each.rows_s for each in outcomes), 4),
        "simulated_idle_train": round(statistics.mean(each.trainer_idle for each in outcomes), 3),
    }


def tables(measured: list[dict[str, Any]]) -> str:
    """What was measured, and what the bound was computed from."""
    idle = [name for name in measured[0] if name.startswith("idle_")]
    found = ("mode", "update_s", "gain", "bound", "gain_over_bound", *idle, "rows_dropped", "max_staleness")
    times = ("mode", "tokens_a_response", "response_s_median", "response_s_p99", "train_busy_s", "simulated_update_s")
    return "\n\n".join(table(measured, columns) for columns in (found, (*times, "simulated_idle_train")))


def table(measured: list[dict[str, Any]], columns: Sequence[str]) -> str:
    lines = ["| " + " | ".join(name.replace("_", " ") for name in columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(str(each.get(name, "")) for name in columns) + " |" for each in measured]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
