"""PyPI's TransferQueue 0.1.11 under the workload of `queue_speed.py`. Run by that, in an environment of its own.

Its actors reserve a CPU each, hence num_cpus=8; polling_mode, because otherwise one waiting consumer stops it.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TQ_LOGGING_LEVEL", "ERROR")
warnings.filterwarnings("ignore")

import ray  # noqa: E402
import torch  # noqa: E402
from tensordict import TensorDict  # noqa: E402

import transfer_queue as tq  # noqa: E402

ROWS, LENGTH, BATCHES = 256, 1024, 40
FIELDS = ["tokens", "logprobs", "mask"]


def batch(rows: int) -> Any:
    torch.manual_seed(0)
    fields = {
        "tokens": torch.randint(0, 150_000, (rows, LENGTH)),
        "logprobs": torch.randn(rows, LENGTH),
        "mask": torch.ones(rows, LENGTH, dtype=torch.int64),
    }
    return TensorDict(fields, batch_size=rows)


def client(address: str) -> Any:
    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, namespace="x")
    tq.init()
    return tq.get_client()


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.001)


def produce(address: str, place: Path) -> None:
    connected, rows = client(address), batch(ROWS)
    connected.put(rows, partition_id="warm")
    (place / "producer").touch()
    wait_for(place / "go")
    for _ in range(BATCHES):
        connected.put(rows, partition_id="run")
    (place / "put").touch()
    wait_for(place / "end")


def fetch(connected: Any, rows: int, partition: str) -> Any:
    while True:
        meta = connected.get_meta(data_fields=FIELDS, batch_size=rows, partition_id=partition, task_name="train")
        if meta.size:
            return meta
        time.sleep(0.001)


def consume(address: str, place: Path) -> None:
    connected = client(address)
    wait_for(place / "producer")
    meta = fetch(connected, ROWS, "warm")
    connected.get_data(meta)
    connected.clear_samples(meta)
    (place / "consumer").touch()
    wait_for(place / "go")
    started = time.perf_counter()
    for _ in range(BATCHES):
        meta = fetch(connected, ROWS, "run")
        got = connected.get_data(meta)
        assert got.batch_size[0] == ROWS
        connected.clear_samples(meta)
    (place / "seconds").write_text(str(time.perf_counter() - started))
    (place / "end").touch()


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        store = 200 << 20
        head = ray.init(
            num_cpus=8, include_dashboard=False, object_store_memory=store, logging_level=logging.ERROR,
            log_to_driver=False, namespace="x",
        )  # fmt: skip
        tq.init({"controller": {"polling_mode": True}, "backend": {"SimpleStorage": {"num_data_storage_units": 2}}})
        address = head.address_info["gcs_address"]
        roles = [
            subprocess.Popen([sys.executable, __file__, role, address, directory]) for role in ("produce", "consume")
        ]
        wait_for(place / "consumer")
        (place / "go").touch()
        for role in roles:
            role.wait(300)
        seconds = float((place / "seconds").read_text())
        tq.close()
        ray.shutdown()
        print(json.dumps({"peer_MB_s": BATCHES * ROWS * LENGTH * 20 / 1e6 / seconds}))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        {"produce": produce, "consume": consume}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
    else:
        main()
