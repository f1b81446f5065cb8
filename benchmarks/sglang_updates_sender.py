"""The part of `sglang_updates.py` that runs in SGLang's environment: its flattened buckets, pickled and broadcast."""

from __future__ import annotations

import json
import socket
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from sglang.srt.utils import MultiprocessingSerializer, init_custom_process_group
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket
from sglang_updates_post import check, post
from transformers import Qwen3ForCausalLM

GROUP = "benchmark"


def main() -> None:
    url, start, rounds, way = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    torch.multiprocessing.set_sharing_strategy("file_system")
    model = Qwen3ForCausalLM.from_pretrained(start)
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    send, seconds = by_tensor if way == "tensor" else by_broadcast(url, tensors), []
    for _ in range(rounds + 1):
        tensors["lm_head.weight"].copy_(tensors["lm_head.weight"].roll(1, 0))
        began = time.perf_counter()
        post(url, "begin_weight_update", {})
        send(url, tensors)
        post(url, "end_weight_update", {})
        seconds.append(time.perf_counter() - began)
        check(url, model)
    print(json.dumps(round(1e3 * statistics.median(seconds[1:]), 1)), flush=True)


def by_tensor(url: str, tensors: dict[str, torch.Tensor]) -> None:
    bucket = FlattenedTensorBucket(named_tensors=list(tensors.items()))
    content = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.metadata}
    payload = MultiprocessingSerializer.serialize(content, output_str=True)
    body = {"serialized_named_tensors": [payload], "load_format": "flattened_bucket", "flush_cache": False}
    post(url, "update_weights_from_tensor", body)


def by_broadcast(url: str, tensors: dict[str, torch.Tensor]) -> Any:
    port = free_port()
    members = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2}
    joined = threading.Thread(
        daemon=True,
        target=lambda: post(url, "init_weights_update_group", {**members, "group_name": GROUP, "backend": "gloo"}),
    )
    joined.start()
    group = init_custom_process_group(
        backend="gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=0, group_name=GROUP
    )
    joined.join()
    body = {
        "names": list(tensors),
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
        "shapes": [list(tensor.shape) for tensor in tensors.values()],
        "group_name": GROUP,
        "load_format": "flattened_bucket",
        "flush_cache": False,
    }

    def send(url: str, tensors: dict[str, torch.Tensor]) -> None:
        asked = threading.Thread(daemon=True, target=lambda: post(url, "update_weights_from_distributed", body))
        asked.start()
        flat = FlattenedTensorBucket(named_tensors=list(tensors.items())).get_flattened_tensor()
        torch.distributed.broadcast(flat, src=0, group=group)
        asked.join()

    return send


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


if __name__ == "__main__":
    main()
