"""Targets of the workers that `scenarios.py` runs: each a few lines that misbehave, or speak, in one way."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import threading
import time
from functools import partial
from typing import Any

import numpy as np

from controllers.context import WorkerContext
from transfer_queue.client import QueueClient
from transfer_queue.rows import Column, RowKey, Rows


def idle(context: WorkerContext) -> None:
    context.ready()
    context.stopping.wait()
    context.log("stopped in good order")


def stubborn(context: WorkerContext) -> None:
    """Deaf to Stop and SIGTERM alike."""
    context.ready()
    threading.Event().wait()


def finisher(context: WorkerContext) -> None:
    context.ready()
    context.announce("run/finished", {})
    context.stopping.wait()


def returner(context: WorkerContext) -> None:
    (context.run_dir / f"order-{context.worker}").write_text(str(len(list(context.run_dir.glob("order-*")))))


def crasher(context: WorkerContext) -> None:
    context.ready()
    asyncio.run(_fall(context))


async def _fall(context: WorkerContext) -> None:
    """While another task waits for the end."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(context.stopped())
        await asyncio.sleep(0)
        raise ValueError("the moon is full")


def bad_callback(context: WorkerContext) -> None:
    context.on("news", lambda payload: payload["no such field"])
    context.announce("news", {})
    context.stopping.wait()


def suicide(context: WorkerContext) -> None:
    """Kills itself in its first life, with a child of its own left behind; ends the run in its second."""
    mark = context.run_dir / "first-life"
    if mark.exists():
        context.announce("run/finished", {})
        context.stopping.wait()
        return
    mark.write_text(str(_sleeper().pid))
    context.ready()
    os.kill(os.getpid(), signal.SIGKILL)


def mortal(context: WorkerContext) -> None:
    """Dies in every life."""
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def with_child(context: WorkerContext) -> None:
    _sleeper()
    context.ready()
    context.stopping.wait()


def frozen(context: WorkerContext) -> None:
    context.ready()
    with context.waiting_for("a coin"):
        threading.Timer(1.3, lambda: os.kill(os.getpid(), signal.SIGSTOP)).start()
        threading.Event().wait()


def stuck(context: WorkerContext) -> None:
    """Holds the interpreter's lock: neither heartbeats nor signal handlers get a turn."""
    context.ready()
    while True:
        ctypes.PyDLL(None).sleep(600)


def herald(context: WorkerContext) -> None:
    """Announces three versions, and one thing to its own node."""
    for version in range(3):
        context.announce("version", {"version": version})
    context.announce("local", {"node": context.node}, everywhere=False)
    context.report({"speed": 1.5}, step=3)
    context.ready()
    context.stopping.wait()


def last_version(context: WorkerContext) -> None:
    """Ends once the herald has announced all its versions."""
    heard = threading.Event()
    context.on("version", lambda payload: heard.set() if payload == {"version": 2} else None)
    assert heard.wait(20), "the herald has not announced version 2"


def late_listener(context: WorkerContext) -> None:
    """Hears in the control thread what had been announced before it started."""
    heard: dict[str, Any] = {}
    complete = threading.Event()

    def hear(topic: str, payload: dict[str, Any]) -> None:
        heard[topic] = payload
        assert threading.current_thread().name == "control"
        if len(heard) == 2:
            complete.set()

    context.on("version", lambda payload: hear("version", payload))
    context.on("worker/finished", lambda payload: hear("worker/finished", payload))
    assert complete.wait(20), f"heard only {heard}"
    assert heard["version"] == {"version": 2}
    context.announce("run/finished", {})
    context.stopping.wait()


def counting_listener(context: WorkerContext) -> None:
    """Wants to hear versions 0, 1, 2 in order from the other node and nothing of that node's own affairs; then meets
    its peers at a rendezvous."""
    versions: list[int] = []
    locals_heard: list[int] = []
    complete = threading.Event()

    def hear(payload: dict[str, Any]) -> None:
        versions.append(payload["version"])
        if payload["version"] == 2:
            complete.set()

    context.on("version", hear)
    context.on("local", lambda payload: locals_heard.append(payload["node"]))
    context.ready()
    assert complete.wait(20), f"heard only {versions}"
    assert versions == sorted(versions)
    assert locals_heard in ([], [context.node])
    host, port = context.rendezvous("world/0")
    (context.run_dir / f"met-{context.rank}").write_text(f"{host}:{port}")
    context.announce(f"met/{context.rank}", {})
    context.stopping.wait()


def source(context: WorkerContext) -> None:
    """Reserves groups as the clock admits them, under the latest version it has heard of, and writes their numbers."""
    version = 0

    def hear(payload: dict[str, Any]) -> None:
        nonlocal version
        version = payload["version"]

    context.on("published", hear)
    with QueueClient(context.queue_endpoints, secret=context.queue_secret) as queue:
        context.ready()
        while not context.stopping.is_set():
            queue.announce(context.name, version)
            for reservation in queue.reserve(context.name, 4, 2, wait_s=0.2):
                numbers = Column.scalars([key.group * 10 + key.index for key in reservation.keys], "int64")
                queue.put(reservation.keys, {"number": numbers}, versions=[reservation.version] * 2)


class Double:
    def __init__(self, context: WorkerContext, settings: dict[str, Any]) -> None:
        self._factor = settings["factor"]

    def process(self, rows: Rows) -> dict[str, Column]:
        return {"product": Column.scalars(rows["number"].values * self._factor, "int64")}


class MortalDouble(Double):
    """Kills its process in its first life, holding rows that it has leased."""

    max_rows = 4

    def __init__(self, context: WorkerContext, settings: dict[str, Any]) -> None:
        super().__init__(context, settings)
        self._mark = context.run_dir / "first-life"

    def process(self, rows: Rows) -> dict[str, Column]:
        assert len(rows) <= self.max_rows
        if not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().process(rows)


class GroupSum:
    """Takes whole groups: every row gets the sum of its group's products."""

    def __init__(self, context: WorkerContext, settings: dict[str, Any]) -> None:
        self._log = context.log

    def process(self, rows: Rows) -> dict[str, Column]:
        groups = np.array([key.group for key in rows.keys])
        products = rows["product"].values
        return {"sum": Column.scalars([int(products[groups == group].sum()) for group in groups], "int64")}

    def close(self) -> None:
        self._log("closed")


class Stalled(Double):
    """Takes its time in its first call, longer than anybody likes."""

    is_first = True

    def process(self, rows: Rows) -> dict[str, Column]:
        if self.is_first:
            self.is_first = False
            time.sleep(5)
        return super().process(rows)


class Broken:
    def __init__(self, context: WorkerContext, settings: dict[str, Any]) -> None:
        pass

    def process(self, rows: Rows) -> dict[str, Column]:
        raise ArithmeticError("cannot multiply today")


def sink(context: WorkerContext) -> None:
    """Trains: takes updates of B rows against the clock, checks what arrives, and announces each new version."""
    batch_rows = context.payload["batch_rows"]
    awaited = {topic: threading.Event() for topic in context.payload["awaits"]}
    for topic, event in awaited.items():
        context.on(topic, partial(_set, event))
    nodes: set[int] = set()
    with QueueClient(context.queue_endpoints, secret=context.queue_secret) as queue:
        context.ready()
        for update in range(context.payload["updates"]):
            keys: list[RowKey] = []
            while len(keys) < batch_rows and not context.stopping.is_set():
                with context.waiting_for("rows to train on"):
                    rows = queue.take("sink", max_rows=batch_rows - len(keys), update=update, wait_s=0.5).rows
                if len(rows):
                    check_sums(rows)
                    keys += rows.keys
            if context.stopping.is_set():
                return
            queue.commit(0, update, keys)
            nodes |= {key.group % context.num_nodes for key in keys}
            context.announce("published", {"version": update + 1})
    for topic, event in awaited.items():
        assert event.wait(20), f"nobody announced {topic}"
    context.report({"nodes": float(len(nodes))}, step=context.payload["updates"])
    context.announce("run/finished", {})
    context.stopping.wait()


def check_sums(rows: Rows) -> None:
    for key, number, total in zip(rows.keys, rows["number"], rows["sum"], strict=True):
        assert number[0] == key.group * 10 + key.index
        assert total[0] == (key.group * 20 + 1) * 3


def _sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "600"])


def _set(event: threading.Event, _payload: dict[str, Any]) -> None:
    event.set()
