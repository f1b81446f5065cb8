"""A shard by the command: its settings from a JSON file, its accounts in the same process or those of a clock that
several shards share, its metrics over HTTP."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from transfer_queue.client import QueueClient
from transfer_queue.clock import LocalClock, RemoteClock
from transfer_queue.config import ConsumerSpec, QueueConfig
from transfer_queue.errors import QueueError
from transfer_queue.metrics import CONTENT_TYPE, prometheus
from transfer_queue.server import QueueServer
from transfer_queue.staleness import Accounts

METRICS_TIMEOUT_S = 5.0
NEEDED = ("batch_rows", "max_staleness")
ACCOUNTS = (*NEEDED, "surplus_rows")


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object with fields of QueueConfig and, where a consumer is training, those of `ACCOUNTS` or the address of
    a clock."""
    try:
        settings = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        raise ValueError(f"config: {str(path)!r}; there is no such file") from None
    except msgspec.MsgspecError as error:
        raise ValueError(f"config: {str(path)!r} is no JSON object: {error}") from error
    known = {*QueueConfig.__dataclass_fields__, *ACCOUNTS, "clock"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"config: {str(path)!r} has {unknown}; known are {sorted(known)}")
    return settings


def make_server(settings: Mapping[str, Any]) -> QueueServer:
    """Raises ValueError, naming field, value and rule."""
    given = dict(settings)
    given.pop("clock", None)
    clock = {name: given.pop(name) for name in ACCOUNTS if name in given}
    try:
        config = msgspec.convert(given, QueueConfig)
    except msgspec.ValidationError as error:
        raise ValueError(f"config: {error}") from error
    if given_clock := settings.get("clock"):
        if clock:
            raise ValueError(f"{', '.join(clock)}: {list(clock.values())}; the clock at {given_clock!r} says them")
        name = f"shard-{config.first_group}"
        return QueueServer(config, RemoteClock(str(given_clock), name, secret=config.secret))
    is_training = any(spec.training for spec in config.consumers.values())
    if is_training and not set(NEEDED) <= set(clock):
        raise ValueError(f"{', '.join(NEEDED)}: {clock}; a training consumer needs both")
    for name, value in clock.items():
        if not isinstance(value, int):
            raise ValueError(f"{name}: {value!r}; must be a whole number")
    return QueueServer(config, LocalClock(Accounts(**({"batch_rows": 1, "max_staleness": 0} | clock))))


def consumer_from(text: str) -> tuple[str, ConsumerSpec]:
    """`NAME=COLUMN,COLUMN`, with `:group` or `:training` at its end where whole groups are taken."""
    name, _, rest = text.partition("=")
    columns, _, kind = rest.partition(":")
    if not name or not columns or kind not in ("", "row", "group", "training"):
        raise ValueError(f"consumer: {text!r}; must read NAME=COLUMN,COLUMN[:group|:training]")
    names = tuple(columns.split(","))
    if kind == "training":
        return name, ConsumerSpec(columns=names, training=True)
    return name, ConsumerSpec(columns=names, unit="group" if kind == "group" else "row")


@contextmanager
def metrics_page(port: int, endpoint: str, secret: str) -> Iterator[int]:
    """Serves `/metrics` on loopback while it is open; yields the port (which the system chooses if it is 0)."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.rstrip("/") != "/metrics":
                self.send_error(404, "the page is /metrics")
                return
            try:
                with QueueClient(endpoint, secret=secret, timeout_s=METRICS_TIMEOUT_S) as client:
                    body = prometheus(client.introspect()).encode()
            except QueueError as error:
                self.send_error(503, str(error).replace("\n", " "))
                return
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Scrapes are no news."""

    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Page)
    except OSError as error:
        raise ValueError(f"metrics_port: {port}; {error}") from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
