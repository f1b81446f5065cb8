"""A training step beside a plain loop over transformers and beside TRL's; the memory of log-probs beside the naive way.

    python benchmarks/trainer.py [--trl-python TRL/bin/python] [--out benchmarks/results/trainer.md]
    python benchmarks/trainer.py --gpu [--out …]

All contestants train the same model on the same length-skewed batch, one after the other, each in a process of its own.
Tokens/s counts prompt and response tokens, never padding. Their first losses are compared: whoever computes something
else does not compete. CPU time is that of all threads of a process: where a machine has other work to do besides, it is
what to look at. Without --trl-python, TRL is left out. Peak memory is what a process grows by during forward and
backward, gradients included. `--gpu` measures a Qwen3-0.6B-shaped model on one GPU instead, and without one it stops.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trainer_batch import Batch, make_batch, make_model, save_batch

ROOT = Path(__file__).resolve().parents[1]
MOST_DIFFERENCE = 1e-3  # between first losses, relative


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, help="interpreter of the environment that has TRL")
    parser.add_argument("--rows", type=int, default=64, help="of the batch; a multiple of --micro-rows")
    parser.add_argument("--median", type=int, default=64, help="response length, tokens")
    parser.add_argument("--sigma", type=float, default=1.0, help="of the log-normal lengths")
    parser.add_argument("--longest", type=int, default=512, help="response, tokens")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--micro-rows", type=int, default=8, help="rows of a padded micro-batch")
    parser.add_argument("--budget", type=int, default=2048, help="tokens of a packed micro-batch")
    parser.add_argument("--steps", type=int, default=5, help="timed, of each contestant")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of torch")
    parser.add_argument("--memory-tokens", type=int, default=2048)
    parser.add_argument("--memory-vocabulary", type=int, default=150_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gpu", action="store_true", help="measure on a GPU instead")
    parser.add_argument("--out", type=Path, help="where the report goes as Markdown")
    return parser.parse_args()


def contestant(python: Path | str, script: str, *arguments: Any, threads: int) -> dict[str, Any]:
    command = [str(python), "-m", f"benchmarks.{script}", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(map(str, arguments))} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure_steps(given: argparse.Namespace, batch: Batch, folder: Path) -> dict[str, dict[str, Any]]:
    save_batch(batch, folder / "batch.npz")
    make_model(folder / "model", given.vocabulary, given.hidden, given.layers)
    common = (folder, given.threads, given.steps)
    ours, theirs = "trainer_steps", "trainer_trl"
    found = {
        "FlowRL": contestant(sys.executable, ours, "flowrl", *common, given.budget, threads=given.threads),
        "plain loop": contestant(sys.executable, ours, "plain", *common, given.micro_rows, threads=given.threads),
    }
    if given.trl_python is not None:
        trl = contestant(given.trl_python, theirs, *common, given.micro_rows, threads=given.threads)
        found[f"TRL {trl['version']}"] = trl
    expected = found["FlowRL"]["loss"]
    for name, result in found.items():
        if abs(result["loss"] - expected) > MOST_DIFFERENCE * abs(expected):
            raise RuntimeError(f"{name}: first loss {result['loss']}, FlowRL's is {expected}; not the same step")
    return found


def report_steps(given: argparse.Namespace) -> list[str]:
    batch = make_batch(given.rows, given.median, given.sigma, given.longest, given.vocabulary, given.seed)
    with tempfile.TemporaryDirectory() as folder:
        found = measure_steps(given, batch, Path(folder))
    ours, our_cpu = (statistics.median(found["FlowRL"][kind]) for kind in ("seconds", "cpu_seconds"))
    lines = [
        f"A step: {given.rows} rows, {batch.num_tokens} tokens, response lengths log-normal (median {given.median}, "
        f"sigma {given.sigma:g}, at most {given.longest}); padding would be {batch.padded_share:.0%} of a rectangle. "
        f"Qwen3, hidden {given.hidden}, {given.layers} layers, vocabulary {given.vocabulary}, float32, "
        f"{given.threads} threads. Padded micro-batches have {given.micro_rows} rows, packed ones {given.budget} "
        f"tokens. Median of {given.steps} steps.",
        "",
        "| | step | tokens/s | FlowRL is faster by | CPU time of a step | FlowRL takes less by | first loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in found.items():
        seconds, cpu = (statistics.median(result[kind]) for kind in ("seconds", "cpu_seconds"))
        lines.append(
            f"| {name} | {seconds:.2f} s | {batch.num_tokens / seconds:,.0f} | {seconds / ours:.2f}× | {cpu:.2f} s | "
            f"{cpu / our_cpu:.2f}× | {result['loss']:.6f} |"
        )
    if given.trl_python is None:
        lines += ["", "TRL: not measured, no --trl-python was given."]
    return lines


def report_memory(given: argparse.Namespace) -> list[str]:
    sizes = (given.memory_tokens, given.hidden, given.memory_vocabulary)
    found = {
        name: contestant(sys.executable, "trainer_steps", name, "-", given.threads, *sizes, threads=given.threads)
        for name in ("chunked", "naive")
    }
    ours, naive = found["chunked"], found["naive"]
    if abs(ours["grad_norm"] - naive["grad_norm"]) > MOST_DIFFERENCE * naive["grad_norm"]:
        raise RuntimeError(f"gradients differ: norms {ours['grad_norm']} and {naive['grad_norm']}")
    return [
        f"Log-probs and their gradient: {sizes[0]} tokens, hidden {sizes[1]}, vocabulary {sizes[2]}, float32.",
        "",
        "| | peak memory | of the naive one | time |",
        "|---|---|---|---|",
        *(
            f"| {name} | {result['bytes'] / 1e6:,.0f} MB | {result['bytes'] / naive['bytes']:.2f} | "
            f"{result['seconds']:.1f} s |"
            for name, result in (("FlowRL, with entropies", ours), ("whole logits, log_softmax", naive))
        ),
    ]


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main() -> None:
    given = parse()
    if given.rows % given.micro_rows:
        raise SystemExit(f"--rows: {given.rows}; must be a multiple of --micro-rows={given.micro_rows}")
    if given.gpu:
        lines = contestant(sys.executable, "trainer_gpu", threads=given.threads)["lines"]
    else:
        lines = [*report_steps(given), "", *report_memory(given)]
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    title = ["# The trainer's step", "", f"{time.strftime('%Y-%m-%d')}, {machine}, commit {commit()}.", ""]
    text = "\n".join([*title, *lines]) + "\n"
    print(text)
    if given.out is not None:
        given.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
