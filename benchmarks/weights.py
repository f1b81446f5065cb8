"""From the end of the optimizer step to the last engine that serves the new version, beside three other ways.

    python benchmarks/weights.py [--sizes 10 100 500] [--engines 1 2] [--rounds 7] [--slow-rounds 3] [--no-copy]
        [--out RESULT.json]

Two trainer ranks (gloo, FSDP2, float32 masters) and one or two processes with an embedded engine (bfloat16), all on
this machine, random weights in the shape of Qwen3. Each round changes the weights, meets, and then publishes; the clock
runs from there, in the last rank to get there, to the last engine's `load_weights` having returned. An engine is told
by one ZeroMQ message. For each size and number of engines, in the same processes and one after the other:

  flowrl     sharded writing into shared memory, one rename, loading in place
  collective `weights.transport: collective` over gloo: the same shards sent into the engine's parameters
  gather     (a) every tensor gathered to rank 0, cast, broadcast with torch.distributed, copied into the engine's model
  directory  (b) every tensor gathered to rank 0, cast, saved as a checkpoint directory, loaded by the engines from it
  bound      (c) the version's bytes once, copied by one thread from memory to memory

pause: how long the slower rank cannot train (`Publisher.begin`), beside one cast-and-copy of that rank's shard into
memory that is warm, on both ranks at once. Medians over the rounds after five that warm up, in which engines come to
know all buffers (after one, of the two slow ways). With `--no-copy` what engines serve is wrong: it shows what all but
their copying takes.
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

ROOT = Path(__file__).resolve().parents[1]
NUM_RANKS = 2
WARM_UPS = 5
SLOW_WARM_UPS = 1
WAYS = ("flowrl", "collective", "gather", "directory")
SHAPES = {  # millions of parameters: hidden size, layers, intermediate size; a vocabulary of 8192, tied
    10: (256, 8, 1024),
    100: (768, 13, 2304),
    500: (1536, 18, 4608),
}


def main() -> None:
    given = parse()
    results = []
    for size in given.sizes:
        for engines in given.engines:
            results.append(measure(size, engines, given))
            print(json.dumps(results[-1]), flush=True)
            if given.out is not None:  # as far as it has got
                given.out.write_text(json.dumps(report(results), indent=2) + "\n")
    print(table(results))


def report(results: list[dict[str, Any]]) -> dict[str, Any]:
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    return {"date": time.strftime("%Y-%m-%d"), "machine": machine, "results": results}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 500], choices=list(SHAPES))
    parser.add_argument("--engines", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slow-rounds", type=int, default=3, help="of gather and directory")
    parser.add_argument("--no-copy", action="store_true", help="FlowRL's engines look at the file and copy nothing")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="where (b) saves")
    parser.add_argument("--out", type=Path, help="where the result goes as JSON")
    return parser.parse_args()


def measure(size: int, engines: int, given: argparse.Namespace) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm", prefix="flowrl-bench-") as memory,
        tempfile.TemporaryDirectory(dir=given.scratch, prefix="flowrl-bench-") as disk,
    ):
        work = Path(memory)
        make_model(work / "model", size)
        roles = [f"rank:{rank}" for rank in range(NUM_RANKS)] + [f"engine:{index}" for index in range(engines)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
        environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        command = [sys.executable, "-P", str(ROOT / "benchmarks" / "weights_processes.py")]
        settings = json.dumps(
            {
                "work": memory,
                "disk": disk,
                "engines": engines,
                "no_copy": given.no_copy,
                "rounds": given.rounds + WARM_UPS,
                "slow_rounds": given.slow_rounds + SLOW_WARM_UPS,
            }
        )
        processes = [
            subprocess.Popen([*command, role, settings], env=environment, stdout=subprocess.PIPE, text=True)
            for role in roles
        ]
        outputs = [process.communicate(timeout=1800)[0] for process in processes]
        for role, process in zip(roles, processes, strict=True):
            if process.returncode:
                raise SystemExit(f"{role} failed with {process.returncode}")
        return summary(size, engines, [json.loads(output.splitlines()[-1]) for output in outputs])


def summary(size: int, engines: int, found: list[dict[str, Any]]) -> dict[str, Any]:
    ranks, served = found[:NUM_RANKS], found[NUM_RANKS:]
    size_bytes = ranks[0]["bytes"]
    result: dict[str, Any] = {"parameters_m": size, "engines": engines, "bytes": size_bytes}
    for way in WAYS:
        times = []
        for round_ in range(len(ranks[0][way])):
            begin = max(rank[way][round_] for rank in ranks)
            times.append(max(engine[way][round_] for engine in served) - begin)
        result[f"{way}_ms"] = 1e3 * median_after_warming_up(way, times)
    result["bound_ms"] = 1e3 * ranks[0]["memcpy"]
    for measured in ("pause", "collective_pause", "cast"):
        rounds = [max(both) for both in zip(*(rank[measured] for rank in ranks), strict=True)]
        result[f"{measured}_ms"] = 1e3 * statistics.median(rounds[WARM_UPS:])
    result["against_gather"] = result["gather_ms"] / result["flowrl_ms"]
    result["against_directory"] = result["directory_ms"] / result["flowrl_ms"]
    result["over_bound"] = result["flowrl_ms"] / result["bound_ms"]
    result["pause_over_cast"] = result["pause_ms"] / result["cast_ms"]
    result |= {f"{way}_moved": number * size_bytes for way, number in moved(engines).items()}
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in result.items()}


def median_after_warming_up(way: str, times: list[float]) -> float:
    return statistics.median(times[SLOW_WARM_UPS if way in ("gather", "directory") else WARM_UPS :])


def moved(engines: int) -> dict[str, int]:
    """From process to process, in versions: a rank's float32 half that the other gathers is one whole version."""
    return {"flowrl": 1 + engines, "collective": engines, "gather": 2 + engines, "directory": 2 + 1 + engines}


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| M parameters | engines | MB | flowrl ms | collective ms | gather ms | directory ms | bound ms | × gather "
        "| × directory | over bound | pause ms | collective's | cast ms | over cast | MB moved |",
        "|" + "---|" * 16,
    ]
    for row in results:
        everything = " / ".join(f"{row[f'{way}_moved'] / 1e6:.0f}" for way in WAYS)
        lines.append(
            f"| {row['parameters_m']} | {row['engines']} | {row['bytes'] / 1e6:.0f} | {row['flowrl_ms']:.1f} "
            f"| {row['collective_ms']:.1f} | {row['gather_ms']:.0f} | {row['directory_ms']:.0f} "
            f"| {row['bound_ms']:.1f} | {row['against_gather']:.1f} | {row['against_directory']:.1f} "
            f"| {row['over_bound']:.2f} | {row['pause_ms']:.1f} | {row['collective_pause_ms']:.1f} "
            f"| {row['cast_ms']:.1f} | {row['pause_over_cast']:.2f} | {everything} |"
        )
    return "\n".join(lines)


def make_model(path: Path, size: int) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, layers, intermediate = SHAPES[size]
    config = Qwen3Config(
        vocab_size=8192,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        intermediate_size=intermediate,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)


if __name__ == "__main__":
    main()
