"""Weights between two virtual hosts: two network namespaces and a link of 1 Gbit/s between them (`tc`). Needs root.

    sudo python benchmarks/weights_link.py [--parameters 100] [--rounds 5] [--rate 1gbit] [--out RESULT.json]

One host has the float32 masters and publishes bfloat16 into shared memory; the other has a relay and nothing else. Each
round takes an AdamW step at learning rate 1e-6 on random gradients, as a trainer would late in its moments, and times
from the commit here to the version being visible there, whole and by changes. Both must be byte for byte the same, by
SHA-256. Printed: bytes of payload, bytes on the link (its counters), seconds, and the share of weights that changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
LEARNING_RATE = 1e-6


def main() -> None:
    given = parse()
    tag = f"fw{os.getpid() % 100000}"
    spaces = [f"{tag}a", f"{tag}b"]
    results = {}
    try:
        connect(spaces, given.rate)
        for way in ("whole", "changes"):
            results[way] = measure(way, spaces, given)
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], check=False)
    report = {"parameters_m": given.parameters, "rate": given.rate, "learning_rate": LEARNING_RATE, **results}
    report["bytes_ratio"] = results["whole"]["payload_bytes"] / results["changes"]["payload_bytes"]
    report["time_ratio"] = results["whole"]["seconds"] / results["changes"]["seconds"]
    print(json.dumps(report, indent=2))
    if given.out is not None:
        given.out.write_text(json.dumps(report, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=100, help="millions")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--out", type=Path, help="where the result goes as JSON")
    return parser.parse_args()


def connect(spaces: list[str], rate: str) -> None:
    def run(line: str) -> None:
        subprocess.run(line.split(), check=True)

    for space in spaces:
        run(f"ip netns add {space}")
    run(f"ip link add v0 netns {spaces[0]} type veth peer name v0 netns {spaces[1]}")
    for space, address in zip(spaces, ADDRESSES, strict=True):
        run(f"ip -n {space} addr add {address}/24 dev v0")
        run(f"ip -n {space} link set v0 up")
        run(f"ip -n {space} link set lo up")
        run(f"ip netns exec {space} tc qdisc add dev v0 root tbf rate {rate} burst 256kb latency 50ms")


def measure(way: str, spaces: list[str], given: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="flowrl-link-") as memory:
        settings = json.dumps(vars(given) | {"out": None, "way": way, "work": memory, "secret": secrets.token_hex(16)})
        processes = [
            subprocess.Popen(
                ["ip", "netns", "exec", space, sys.executable, "-P", __file__, "--host", str(host), settings],
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for host, space in enumerate(spaces)
        ]
        try:
            outputs = [process.communicate(timeout=900)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        source, target = (json.loads(output.splitlines()[-1]) for output in outputs)
    assert source["digests"] == target["digests"], "the hosts have different bytes"
    rounds = range(1, given.rounds + 1)  # version 0 is whole either way
    seconds = [target["visible"][version] - source["committed"][version] for version in rounds]
    return {
        "version_bytes": source["bytes"],
        "payload_bytes": statistics.median(target["received"][version] for version in rounds),
        "link_bytes": (source["link_bytes"] - source["link_bytes_0"]) / given.rounds,
        "seconds": statistics.median(seconds),
        "changed_share": statistics.median(source["changed"][1:]),
        "is_equal": True,
    }


def run_host(host: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Files in `work` are how the two ends find each other and keep in step; bytes go by the link alone."""
    from flowrl.weights.relay import Relay
    from flowrl.weights.slices import Holdings
    from flowrl.weights.store import WeightStore

    work, versions = Path(settings["work"]), settings["rounds"] + 1
    store = WeightStore(work / f"store-{host}", 3)
    visible: dict[int, float] = {}
    relay = Relay(
        node=host,
        serving=[1],
        store=store,
        written=store if host == 0 else None,
        companions=[],
        bind=f"tcp://{ADDRESSES[host]}:*",
        secret=settings["secret"],
        delta=settings["way"] == "changes",
        anchor_every=10**6,
        on_published=lambda version, path: visible.__setitem__(version, time.monotonic()),
    )
    say(work / f"endpoint-{host}", relay.endpoint)
    relay.connect(1 - host, hear(work / f"endpoint-{1 - host}"))
    thread = threading.Thread(target=relay.run, daemon=True)
    thread.start()
    found: dict[str, Any] = {"digests": []}
    if host == 0:
        found |= publish_all(work, store, relay, settings["parameters"] * 1_000_000, versions)
    else:
        relay.hold(Holdings.of([0], [[(0, int(hear(work / "bytes")))]], int(hear(work / "bytes"))))
        for version in range(versions):
            hear(work / f"written-{version}")
            relay.written(0, version)
            while version not in visible:
                assert thread.is_alive(), "the relay has failed"
                time.sleep(0.0005)
            found["digests"].append(sha256(store, version))
            say(work / f"arrived-{version}", "yes")
        found |= {"visible": [visible[version] for version in range(versions)]}
        found |= {"received": [relay.received_bytes[version] for version in range(versions)]}
    relay.stop()
    thread.join(30)
    return found


def publish_all(work: Path, store: Any, relay: Any, num_parameters: int, versions: int) -> dict[str, Any]:
    import torch

    from flowrl.weights.pool import BufferPool
    from flowrl.weights.slices import Holdings
    from flowrl.weights.tensorfile import Kind, TensorFileLayout

    torch.manual_seed(0)
    masters = torch.nn.Parameter(torch.randn(num_parameters) * 0.02)
    adam = torch.optim.AdamW([masters], lr=LEARNING_RATE, weight_decay=0.0)
    layout = TensorFileLayout({"w": Kind(masters.shape, torch.bfloat16)})
    pool = BufferPool(store, layout, [], lambda version, path: None)
    relay.hold(Holdings.of([0], [[(0, layout.num_bytes)]], layout.num_bytes))
    say(work / "bytes", str(layout.num_bytes))
    found: dict[str, Any] = {"bytes": layout.num_bytes, "committed": [], "changed": [], "digests": []}
    before = masters.detach().to(torch.bfloat16)
    for version in range(versions):
        masters.grad = torch.randn(num_parameters)
        adam.step()
        buffer = pool.begin()
        begin = layout.slots["w"].begin
        buffer.bytes[begin:].view(torch.bfloat16).copy_(masters.detach())
        now = masters.detach().to(torch.bfloat16)
        found["changed"].append((now.view(torch.int16) != before.view(torch.int16)).float().mean().item())
        before = now
        assert pool.commit(buffer, version, "") is not None
        found["committed"].append(time.monotonic())
        say(work / f"written-{version}", "yes")
        hear(work / f"arrived-{version}")
        found["digests"].append(sha256(store, version))
        if version == 0:
            found["link_bytes_0"] = link_bytes()
    found["link_bytes"] = link_bytes()
    pool.close()
    return found


def link_bytes() -> int:
    """Sent over this host's end of the link."""
    output = subprocess.run(["ip", "-s", "-j", "link", "show", "v0"], check=True, capture_output=True).stdout
    return int(json.loads(output)[0]["stats64"]["tx"]["bytes"])


def sha256(store: Any, version: int) -> str:
    return hashlib.sha256((store.path(version) / "model.safetensors").read_bytes()).hexdigest()


def say(path: Path, text: str) -> None:
    staging = path.with_suffix(".new")
    staging.write_text(text)
    staging.rename(path)


def hear(path: Path, timeout_s: float = 300) -> str:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {path.name}"
        time.sleep(0.0005)
    return path.read_text()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--host"]:
        print(json.dumps(run_host(int(sys.argv[2]), json.loads(sys.argv[3]))))
    else:
        main()
