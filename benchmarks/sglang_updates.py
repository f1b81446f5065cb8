"""How a running SGLang server takes new weights: from the directory in shared memory, as FlowRL has it do, beside the
other two of its update calls.

    python benchmarks/sglang_updates.py --sglang-python .venv-sglang/bin/python [--sizes 10 100] [--out RESULT.json]

One server on CPU, one trainer process that has the weights already cast, one thread each. The clock runs from the first
byte that the trainer writes or sends to the server's answer that it has loaded all, with `flush_cache` off throughout.

  disk         the tensors copied into one safetensors file in shared memory, then `update_weights_from_disk`
  tensor       one flattened bucket, pickled with its memory shared, then `update_weights_from_tensor`
  distributed  `update_weights_from_distributed`: one flattened bucket broadcast over gloo; the group is made before

After each the server's next token must have the log-prob that the version sent gives it. `sglang_updates_sender.py`
sends the last two, in SGLang's own environment.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sglang_updates_post import check, post
from transformers import Qwen3Config, Qwen3ForCausalLM

from flowrl.rollout.sglang.arguments import ServerSettings
from flowrl.rollout.sglang.client import SGLangClient
from flowrl.rollout.sglang.server import ServerProcess

WIDTHS = {10: (256, 10), 100: (768, 12)}  # millions of parameters -> hidden size, layers
GLOO = {"GLOO_SOCKET_IFNAME": "lo"}
LIMIT_S = 240
SENDER = Path(__file__).with_name("sglang_updates_sender.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sglang-python", type=Path, required=True, help="interpreter of the environment with SGLang")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(WIDTHS), choices=list(WIDTHS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="where the result goes as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in given.sizes:
        with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="flowrl-bench-") as folder:
            rows.append(asyncio.run(measure(size, Path(folder), given)))
            print(rows[-1], flush=True)
    result = {"date": time.strftime("%Y-%m-%d"), "load_average": os.getloadavg()[0], "sizes": rows}
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


async def measure(size: int, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    model = make_model(size)
    start = folder / "start"
    model.save_pretrained(start)
    settings = ServerSettings(
        python=str(given.sglang_python), device="cpu", log_path=folder / "log", env={"OMP_NUM_THREADS": "1", **GLOO}
    )
    server = ServerProcess(settings)
    await server.launch(start, 0)
    try:
        client = SGLangClient(server.url, server.name)
        await server.ready(client)
        await client.close()
        disk = await asyncio.to_thread(from_disk, server.url, model, start, folder, given.rounds)
        command = [str(given.sglang_python), str(SENDER), server.url, str(start), str(given.rounds)]
        others = {f"{way}_ms": await asyncio.to_thread(send, [*command, way]) for way in ("tensor", "distributed")}
    finally:
        await server.close()
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    return {
        "parameters_m": size,
        "MB": round(num_bytes / 1e6),
        "disk_ms": round(1e3 * statistics.median(disk), 1),
        **others,
    }


def send(command: list[str]) -> float | str:
    """Milliseconds, or why there are none. Through files: the manager of torch's shared memory, which outlives the
    sender, would keep a pipe open."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | GLOO
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complaint:
        try:
            code = subprocess.run(
                command, stdout=said, stderr=complaint, timeout=LIMIT_S, env=environment, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return f"not done in {LIMIT_S} s"
        said.seek(0)
        complaint.seek(0)
        return float(said.read().splitlines()[-1]) if code == 0 else complaint.read().strip().splitlines()[-1]


def make_model(size: int) -> Qwen3ForCausalLM:
    hidden, layers = WIDTHS[size]
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=8192, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, head_dim=32,
            max_position_embeddings=1024, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def from_disk(url: str, model: Qwen3ForCausalLM, start: Path, folder: Path, rounds: int) -> list[float]:
    """A file for each version, as a new one is written while engines still read the last."""
    seconds = []
    for number in range(rounds + 1):
        change(model, number)
        version = folder / f"v{number}"
        version.mkdir()
        (version / "config.json").symlink_to(start / "config.json")
        began = time.perf_counter()
        save_file(model.state_dict(), version / "model.safetensors")
        post(url, "update_weights_from_disk", {"model_path": str(version), "flush_cache": False})
        seconds.append(time.perf_counter() - began)
        check(url, model)
        if number:
            (folder / f"v{number - 1}" / "model.safetensors").unlink()
    return seconds[1:]


@torch.no_grad()
def change(model: Qwen3ForCausalLM, number: int) -> None:
    torch.manual_seed(number)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.normal_(std=0.05)


if __name__ == "__main__":
    main()
