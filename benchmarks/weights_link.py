"""Weights between two virtual hosts: two network namespaces and a link between them (`tc`). Needs root.

    sudo python benchmarks/weights_link.py [--gbits 1 10 inf] [--learning-rates 1e-7 1e-6 1e-5 1e-4] [--parameters 100]
        [--rounds 5] [--after-writing] [--plain] [--out RESULT.json]

One host has the float32 masters and publishes bfloat16 into shared memory; the other has a relay and nothing else. Each
round takes AdamW steps on random gradients, as a trainer would late in its moments, and times from the end of the step
here to the version being visible there: one version whole, one by changes, and, when all of these have been, one as the
relay chooses. With `--after-writing` nothing is sent before all of a version is written; with `--plain` nothing is
encrypted. All must be byte for byte the same on both hosts, by SHA-256. A link of `inf` Gbit/s has no limit but what
memory, encryption and the two processes take. Printed, as medians: the share of weights that changed, bytes of payload,
bytes on the link (its counters), seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
WARM_VERSIONS = 4
"""Until all buffers of the receiver have been written to once."""
WAYS = ("whole", "changes", "chosen")


def main() -> None:
    given = parse()
    rows = []
    for gbits in given.gbits:
        tag = f"fw{os.getpid() % 100000}"
        spaces = [f"{tag}a", f"{tag}b"]
        try:
            connect(spaces, gbits)
            for rate in given.learning_rates:
                wanted = {
                    "rounds": given.rounds,
                    "parameters": given.parameters,
                    "after": given.after_writing,
                    "secret": "" if given.plain else secrets.token_hex(16),
                }
                found = measure(spaces, wanted | {"learning_rate": rate})
                rows.append({"gbits": gbits, "learning_rate": rate} | found)
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        finally:
            for space in spaces:
                subprocess.run(["ip", "netns", "del", space], check=False)
    print(table(rows))
    if given.out is not None:
        given.out.write_text(json.dumps({"parameters_m": given.parameters, "rows": rows}, indent=2) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gbits", type=float, nargs="+", default=[1, 10, math.inf], help="of the link, a second")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-7, 1e-6, 1e-5, 1e-4])
    parser.add_argument("--parameters", type=int, default=100, help="millions")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--after-writing", action="store_true", help="do not send what is still being written")
    parser.add_argument("--plain", action="store_true", help="do not encrypt")
    parser.add_argument("--out", type=Path, help="where the result goes as JSON")
    return parser.parse_args()


def table(rows: Sequence[dict[str, Any]]) -> str:
    heads = ["Gbit/s", "learning rate", "changed", "whole MB", "changes MB", "fewer"]
    heads += ["whole s", "changes s", "chosen s", "chosen"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        megabytes, seconds = ([row[way][what] for way in WAYS] for what in ("payload_bytes", "seconds"))
        lines.append(
            [
                *(f"{row['gbits']:g}", f"{row['learning_rate']:g}", f"{row['changed_share']:.1%}"),
                *(f"{value / 1e6:.2f}" for value in megabytes[:2]),
                f"{megabytes[0] / megabytes[1]:.1f} ×",
                *(f"{value:.2f}" for value in seconds),
                "whole" if megabytes[2] == megabytes[0] else "changes",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def connect(spaces: list[str], gbits: float) -> None:
    def run(line: str) -> None:
        subprocess.run(line.split(), check=True)

    for space in spaces:
        run(f"ip netns add {space}")
    run(f"ip link add v0 netns {spaces[0]} type veth peer name v0 netns {spaces[1]}")
    for space, address in zip(spaces, ADDRESSES, strict=True):
        run(f"ip -n {space} addr add {address}/24 dev v0")
        run(f"ip -n {space} link set v0 up")
        run(f"ip -n {space} link set lo up")
        if gbits < math.inf:
            limit = f"rate {gbits * 1000:.0f}mbit burst {max(256, gbits * 250):.0f}kb latency 50ms"
            run(f"ip netns exec {space} tc qdisc add dev v0 root tbf {limit}")


def measure(spaces: list[str], wanted: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="flowrl-link-") as memory:
        settings = json.dumps(wanted | {"work": memory})
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
    last = WARM_VERSIONS + 2 * wanted["rounds"]
    versions = (range(WARM_VERSIONS, last, 2), range(WARM_VERSIONS + 1, last, 2), range(last, last + wanted["rounds"]))
    found: dict[str, Any] = {"changed_share": statistics.median(source["changed"][WARM_VERSIONS:])}
    for way, of_way in zip(WAYS, versions, strict=True):
        found[way] = {
            "payload_bytes": statistics.median(target["received"][version] for version in of_way),
            "link_bytes": statistics.median(source["link_bytes"][version] for version in of_way),
            "seconds": statistics.median(target["visible"][one] - source["stepped"][one] for one in of_way),
        }
    return found


def run_host(host: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Files in `work` are how the two ends find each other and keep in step; bytes go by the link alone."""
    from flowrl.weights.relay import Relay
    from flowrl.weights.slices import Holdings
    from flowrl.weights.store import WeightStore

    work = Path(settings["work"])
    chosen_from = WARM_VERSIONS + 2 * settings["rounds"]
    versions = chosen_from + settings["rounds"]
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
        anchor_every=2,  # whole and by changes in turn
        on_published=lambda version, path: visible.__setitem__(version, time.monotonic()),
    )
    say(work / f"endpoint-{host}", relay.endpoint)
    relay.connect(1 - host, hear(work / f"endpoint-{1 - host}"))
    thread = threading.Thread(target=relay.run, daemon=True)
    thread.start()
    found: dict[str, Any] = {"digests": []}
    if host == 0:
        found |= publish_all(work, store, relay, settings, versions)
    else:
        relay.hold(Holdings.of([0], [[(0, int(hear(work / "bytes")))]], int(hear(work / "bytes"))))
        for version in range(versions):
            if version == chosen_from:
                relay._anchor_every = 10**6
            if not settings["after"]:
                hear(work / f"begun-{version}")
                relay.begun(0, version, Path())
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


def publish_all(work: Path, store: Any, relay: Any, settings: dict[str, Any], versions: int) -> dict[str, Any]:
    import torch
    from safetensors.torch import save_file

    from flowrl.weights.progress import Followed
    from flowrl.weights.publish import Publisher

    torch.manual_seed(0)
    words = torch.nn.ParameterList(torch.randn(1_000, 1_000) * 0.02 for _ in range(settings["parameters"]))
    (work / "model").mkdir()
    save_file(
        {name: word.detach().to(torch.bfloat16) for name, word in words.named_parameters()},
        work / "model" / "w.safetensors",
    )
    adam = torch.optim.AdamW(words.parameters(), lr=settings["learning_rate"], weight_decay=0.0)

    def begun(version: int, path: Path) -> None:
        relay.begun(0, version, path)
        say(work / f"begun-{version}", "yes")

    def published(version: int, path: Path) -> None:
        relay.written(0, version)
        say(work / f"written-{version}", "yes")

    followed = None if settings["after"] else Followed(begun, lambda version: None)
    publisher = Publisher(words, work / "model", store, "bfloat16", on_published=published, followed=followed)
    found: dict[str, Any] = {"stepped": [], "changed": [], "digests": [], "link_bytes": []}
    before = [word.detach().to(torch.bfloat16) for word in words]
    for version in range(versions):
        for word in words:
            word.grad = torch.randn_like(word)
        sent = link_bytes()
        adam.step()
        now = [word.detach().to(torch.bfloat16) for word in words]
        changed = [
            (new.view(torch.int16) != old.view(torch.int16)).float().mean().item()
            for new, old in zip(now, before, strict=True)
        ]
        found["changed"].append(statistics.mean(changed))
        before = now
        found["stepped"].append(time.monotonic())
        publisher.begin(version)
        if not version:  # holdings are known once something has been published
            publisher.finish()
            relay.hold(publisher.holdings([0]))
            say(work / "bytes", str(publisher.num_bytes))
        hear(work / f"arrived-{version}")
        found["link_bytes"].append(link_bytes() - sent)
        found["digests"].append(sha256(store, version))
    publisher.close()
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
