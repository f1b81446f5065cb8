"""Hosts that are network namespaces of this machine, on one switch: each has its own loopback, address and processes.

with hosts(2) as (a, b):
    with a.started(command) as process: ...
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.runs import ROOT

SUBNET = "10.77.0"
INTERFACE = "eth0"
SWITCH = "bridge"


@dataclass(frozen=True)
class Host:
    """namespace: of `ip netns`. port: its end of the cable at the switch, whose own namespace is `switch`."""

    namespace: str
    address: str
    switch: str
    port: str

    @contextlib.contextmanager
    def started(self, arguments: Sequence[str], cwd: Path) -> Iterator[subprocess.Popen[str]]:
        """A process on the host, output and errors together. Killed with all its host's processes on the way out."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *arguments], cwd=cwd, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        try:
            yield process
        finally:
            self.lose_power()
            process.wait(10)
            assert process.stdout is not None
            process.stdout.close()

    def pids(self) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def lose_power(self) -> None:
        """Everything on it is dead at once, and its cable with it: nobody is told by a closed connection."""
        self.cut()
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut(self) -> None:
        """Packets are lost from now on; both ends believe that they are connected."""
        _ip("-n", self.switch, "link", "set", self.port, "nomaster")

    def mend(self) -> None:
        """After `cut`: what is sent from now on arrives."""
        _ip("-n", self.switch, "link", "set", self.port, "master", SWITCH)

    def slow_down(self, delay_ms: int, megabits: int) -> None:
        """What the host sends and what it gets. A kernel without netem limits the rate alone; packets then wait for
        each other, for up to ten times the delay."""
        netem = ["netem", "delay", f"{delay_ms}ms", "rate", f"{megabits}mbit"]
        bucket = ["tbf", "rate", f"{megabits}mbit", "burst", "16kb", "latency", f"{10 * delay_ms}ms"]
        for namespace, device in ((self.namespace, INTERFACE), (self.switch, self.port)):
            queueing = ["tc", "-n", namespace, "qdisc", "add", "dev", device, "root"]
            if subprocess.run([*queueing, *netem], check=False, capture_output=True).returncode:
                _run(*queueing, *bucket)


@contextlib.contextmanager
def hosts(num_hosts: int) -> Iterator[list[Host]]:
    """Skips the test where namespaces are not allowed."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        pytest.skip("needs ip and tc (iproute2)")
    mark = uuid.uuid4().hex[:6]
    switch = f"frl{mark}sw"
    made = [switch]
    try:
        try:
            _ip("netns", "add", switch)
            _ip("-n", switch, "link", "add", SWITCH, "type", "bridge")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
        _ip("-n", switch, "link", "set", SWITCH, "up")
        found = []
        for number in range(num_hosts):
            host = Host(f"frl{mark}h{number}", f"{SUBNET}.{number + 1}", switch, f"port{number}")
            made.append(host.namespace)
            _plug_in(host)
            found.append(host)
        yield found
    finally:
        for namespace in made:
            subprocess.run(["ip", "netns", "delete", namespace], check=False, capture_output=True)


def _plug_in(host: Host) -> None:
    _ip("netns", "add", host.namespace)
    cable = ["link", "add", host.port, "type", "veth", "peer", "name", INTERFACE, "netns", host.namespace]
    _ip("-n", host.switch, *cable)
    _ip("-n", host.switch, "link", "set", host.port, "master", SWITCH, "up")
    _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
    for device in ("lo", INTERFACE):
        _ip("-n", host.namespace, "link", "set", device, "up")


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
