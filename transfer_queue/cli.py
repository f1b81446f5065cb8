"""The `transfer-queue` command: serve a shard, or the clock of several; look into shards, drain and save them."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from transfer_queue.client import QueueClient
from transfer_queue.clock_server import ClockServer
from transfer_queue.errors import QueueError
from transfer_queue.metrics import prometheus
from transfer_queue.rows import Rows
from transfer_queue.staleness import Accounts
from transfer_queue.standalone import ACCOUNTS, consumer_from, make_server, metrics_page, read_settings

DRAINED_ROWS = 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 if a shard is not well; 2 for a user's mistake."""
    given = parser().parse_args(arguments)
    try:
        return given.run(given)
    except ValueError as error:
        print(f"transfer-queue: {error}", file=sys.stderr)
        return 2
    except QueueError as error:
        print(f"transfer-queue: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="transfer-queue", description="Streams rows between processes.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands.add_parser("serve", help="run one shard until SIGINT or SIGTERM"))
    _add_clock(commands.add_parser("clock", help="keep the accounts that several shards share"))
    inspect = commands.add_parser("inspect", help="what shards hold, and who waits for what; consumes nothing")
    inspect.add_argument("--watch", type=float, metavar="SECONDS", help="again and again")
    form = inspect.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON, one object a line")
    form.add_argument("--metrics", action="store_true", help="as Prometheus text")
    inspect.set_defaults(run=run_inspect)
    health = commands.add_parser("health", help="whether shards answer; exit code 1 if one does not")
    health.set_defaults(run=run_health)
    drain = commands.add_parser("drain", help="take all that is ready for a consumer, and acknowledge it")
    drain.add_argument("--consumer", required=True)
    where = drain.add_mutually_exclusive_group(required=True)
    where.add_argument("--to", type=Path, metavar="FILE", help="append the rows, as JSON lines")
    where.add_argument("--discard", action="store_true", help="let the rows go")
    drain.add_argument("--wait", type=float, default=0.0, metavar="SECONDS", help="for more rows (0)")
    drain.set_defaults(run=run_drain)
    save = commands.add_parser("save", help="write what shards hold to files that a later queue can go on from")
    save.add_argument("--to", type=Path, required=True, metavar="DIRECTORY", help="below the shards' --save-dir")
    save.set_defaults(run=run_save)
    for command in (inspect, health, drain, save):
        command.add_argument("endpoints", nargs="+", metavar="ENDPOINT")
        command.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS", help="for an answer (5)")
    for command in commands.choices.values():
        command.add_argument("--secret-file", type=Path, help="holds the shards' shared secret; needed off loopback")
    return top


def _add_serve(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("--endpoint", help="ipc://PATH or tcp://HOST:PORT (* lets the system choose the port)")
    serve.add_argument("--config", type=Path, help="JSON: fields of QueueConfig, and of its accounts")
    serve.add_argument(
        "--consumer", action="append", default=[], metavar="NAME=COLUMN,…[:group|:training]",
        help="who reads which columns; once for each",
    )  # fmt: skip
    serve.add_argument("--batch-rows", type=int, help="rows of an update of the training consumer")
    serve.add_argument("--max-staleness", type=int, help="updates by which a row may be older")
    serve.add_argument("--surplus-rows", type=int, help="rows admitted beyond those that updates have room for (0)")
    serve.add_argument("--byte-limit", type=int, help="bytes that rows may take")
    serve.add_argument("--save-dir", metavar="DIRECTORY", help="below which `save` may write")
    serve.add_argument("--shard", metavar="K/N", help="this one's number, from 0, and how many there may be (0/1)")
    serve.add_argument("--clock", metavar="ENDPOINT", help="of the accounts that the shards share")
    serve.add_argument("--metrics-port", type=int, help="serve Prometheus metrics on 127.0.0.1 (0: any port)")
    serve.set_defaults(run=run_serve)


def _add_clock(clock: argparse.ArgumentParser) -> None:
    clock.add_argument("--endpoint", required=True, help="ipc://PATH or tcp://HOST:PORT (* lets the system choose)")
    clock.add_argument("--batch-rows", type=int, required=True, help="rows of an update of the training consumer")
    clock.add_argument("--max-staleness", type=int, required=True, help="updates by which a row may be older")
    clock.add_argument(
        "--surplus-rows", type=int, default=0, help="rows admitted beyond those that updates have room for (0)"
    )
    clock.set_defaults(run=run_clock)


# serve, clock


def run_serve(given: argparse.Namespace) -> int:
    settings = read_settings(given.config) if given.config else {}
    for name in ("endpoint", *ACCOUNTS, "byte_limit", "save_dir", "clock"):
        if getattr(given, name) is not None:
            settings[name] = getattr(given, name)
    if given.shard is not None:
        settings["first_group"], settings["group_stride"] = _shard_number(given.shard)
    if given.consumer:
        settings["consumers"] = dict(map(consumer_from, given.consumer))
    for name, hint in (("endpoint", "--endpoint"), ("consumers", "--consumer")):
        if name not in settings:
            raise ValueError(f"{name}: missing; say {hint}, or give it in --config")
    if given.secret_file:
        settings["secret"] = secret_of(given)
    server = make_server(settings)
    with ExitStack() as stack:
        stack.callback(server.close)
        stop = stack.enter_context(end_signals())
        print(f"serving {server.endpoint}", flush=True)
        if given.metrics_port is not None:
            port = stack.enter_context(metrics_page(given.metrics_port, server.endpoint, settings.get("secret", "")))
            print(f"metrics at http://127.0.0.1:{port}/metrics", flush=True)
        server.serve(stop)
    return 0


def run_clock(given: argparse.Namespace) -> int:
    accounts = Accounts(given.batch_rows, given.max_staleness, surplus_rows=given.surplus_rows)
    server = ClockServer(given.endpoint, accounts, secret_of(given) if given.secret_file else "")
    with ExitStack() as stack:
        stack.callback(server.close)
        stop = stack.enter_context(end_signals())
        print(f"clock at {server.endpoint}", flush=True)
        server.serve(stop.fileno())
    return 0


def _shard_number(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise ValueError(f"shard: {text!r}; must read K/N, with K from 0 to N - 1")
    return int(number), int(of)


@contextmanager
def end_signals() -> Iterator[socket.socket]:
    """Becomes readable at SIGINT or SIGTERM. (A handler in Python would not run before a poll that has just begun.)"""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    with receiver, sender:
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
        wakeup = signal.set_wakeup_fd(sender.fileno())
        try:
            yield receiver
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)


# inspect, health


def run_inspect(given: argparse.Namespace) -> int:
    with client_of(given) as client:
        while True:
            reports = client.introspect()
            if given.json:
                print(json.dumps(reports), flush=True)
            elif given.metrics:
                print(prometheus(reports), end="", flush=True)
            else:
                print("\n\n".join(f"{endpoint}\n{report_text(report)}" for endpoint, report in reports.items()))
            if given.watch is None:
                return 0
            time.sleep(given.watch)
            print()


def run_save(given: argparse.Namespace) -> int:
    with client_of(given) as client:
        print(f"{client.save(str(given.to.resolve()))} rows saved to {given.to}")
    return 0


def run_health(given: argparse.Namespace) -> int:
    failures = 0
    for endpoint in given.endpoints:
        started = time.monotonic()
        try:
            with QueueClient(endpoint, secret=secret_of(given), timeout_s=given.timeout) as client:
                (report,) = client.introspect().values()
        except QueueError as error:
            failures += 1
            print(f"FAILED {endpoint}: {error}")
            continue
        answer_ms = 1000 * (time.monotonic() - started)
        version, rows = report["clock"]["version"], report["stored_rows"]
        print(f"ok {endpoint}: answered in {answer_ms:.1f} ms; version {version}, {rows} rows")
    return 1 if failures else 0


def report_text(report: Mapping[str, Any]) -> str:
    """A few tables of one shard's report."""
    clock = report["clock"]
    lines = [
        f"  version {clock['version']} (incarnation {clock['incarnation']}), {clock['filled']} of "
        f"{clock['batch_rows']} rows in its update, staleness at most {clock['max_staleness']}"
        + ("; a shard has died, and the trainer must begin anew" if clock["is_broken"] else "")
        + (f"; shards yet to follow it: {clock['awaited_shards']}" if clock["awaited_shards"] else ""),
        f"  {report['stored_rows']} rows, {mebibytes(report['stored_bytes'])} stored, "
        f"{mebibytes(report['promised_bytes'])} promised of {mebibytes(report['byte_limit'])}",
    ]
    for name, state in report["partitions"].items():
        due = ", ".join(f"{rows} due {deadline}" for deadline, rows in sorted(state["outstanding"].items()))
        lines.append(
            f"  partition {name}: {state['groups']} groups, oldest {state['oldest_s']:.1f} s, "
            f"{state['rows_unfinished']} rows unfinished, {state['to_reserve_anew']} groups to come again"
            + (f"; outstanding {due}" if due else "")
        )
    columns = ("reserved", "ready", "leased", "done", "redelivered")
    width = max([len("consumer"), *map(len, report["consumers"])])
    lines.append("  " + "consumer".ljust(width) + "".join(column.rjust(13) for column in columns))
    for name, state in report["consumers"].items():
        lines.append("  " + name.ljust(width) + "".join(str(state[column]).rjust(13) for column in columns))
    if report["ended"]:
        lines.append("  ended unconsumed: " + ", ".join(f"{rows} {why}" for why, rows in report["ended"].items()))
    for waiter in report["waiters"]:
        lines.append(f"  waiting: {waiter['verb']} of {waiter['who']} for {waiter['for']}")
    return "\n".join(lines)


def mebibytes(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"


# drain


def run_drain(given: argparse.Namespace) -> int:
    count = 0
    with ExitStack() as stack:
        file = stack.enter_context(given.to.open("a", encoding="utf-8")) if given.to else None
        client = stack.enter_context(client_of(given))
        while True:
            rows = client.take(given.consumer, DRAINED_ROWS, wait_s=given.wait).rows
            if not len(rows):
                break
            if file is not None:
                write_rows(file, rows)
            count += client.ack(given.consumer, rows.keys)
    print(f"{count} rows of {given.consumer} {'discarded' if given.discard else f'written to {given.to}'}")
    return 0


def write_rows(file: TextIO, rows: Rows) -> None:
    """One object a line: key, version, columns. On disk when it returns, because the rows are acknowledged then."""
    for at, key in enumerate(rows.keys):
        columns = {name: column[at].tolist() for name, column in rows.columns.items()}
        line = {"key": [key.partition, key.group, key.index, key.attempt], "version": rows.versions[at]}
        file.write(json.dumps({**line, "columns": columns}) + "\n")
    file.flush()
    os.fsync(file.fileno())


def client_of(given: argparse.Namespace) -> QueueClient:
    return QueueClient(given.endpoints, secret=secret_of(given), timeout_s=given.timeout)


def secret_of(given: argparse.Namespace) -> str:
    if given.secret_file is None:
        return ""
    try:
        return given.secret_file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(f"secret_file: {str(given.secret_file)!r}; {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
