"""What `introspect` says, as Prometheus text (exposition format 0.0.4). Pure.

Gauges are as of now; what counts up since the shard's start ends in `_total`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

_DIGITS = re.compile(r"\s*\d")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metric(NamedTuple):
    """labels: (name, value) beside the shard's own."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


_HELP = {
    "version": "Policy version that the clock is at.",
    "update_filled_rows": "Rows already in the update under way.",
    "stored_rows": "Rows with payload.",
    "stored_bytes": "Bytes of payload.",
    "promised_bytes": "Bytes that reservations were promised, stored ones included.",
    "byte_limit_bytes": "Bytes the shard may promise.",
    "segment_bytes": "Bytes of the memory that payload lies in.",
    "partition_groups": "Groups that somebody still needs.",
    "partition_unfinished_rows": "Rows without their first column.",
    "partition_to_reserve_anew": "Groups lost or dropped whose prompts come again.",
    "partition_oldest_seconds": "Age of the oldest group.",
    "outstanding_rows": "Rows that the staleness accounts count here, by deadline.",
    "consumer_rows": "Rows by consumer and state.",
    "consumer_done_total": "Rows that the consumer has finished.",
    "consumer_redelivered_total": "Rows whose lease was lost.",
    "ended_rows_total": "Rows that left unconsumed, by reason.",
    "waiters": "Parked requests, by verb and what they wait for (without its number).",
    "producer_version": "Version that the producer's engine has announced.",
}


def prometheus(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """reports: by endpoint, as `QueueClient.introspect` returns them."""
    samples: dict[str, list[str]] = {name: [] for name in _HELP}
    for endpoint, report in reports.items():
        for metric in _metrics(report):
            labels = ",".join(f'{name}="{_escape(value)}"' for name, value in (("shard", endpoint), *metric.labels))
            samples[metric.name].append(f"transfer_queue_{metric.name}{{{labels}}} {_number(metric.value)}")
    lines = []
    for name, values in samples.items():
        if values:
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP transfer_queue_{name} {_HELP[name]}", f"# TYPE transfer_queue_{name} {kind}", *values]
    return "\n".join(lines) + "\n"


def _metrics(report: Mapping[str, Any]) -> Iterator[Metric]:
    yield Metric("version", (), report["clock"]["version"])
    yield Metric("update_filled_rows", (), report["clock"]["filled"])
    yield Metric("byte_limit_bytes", (), report["byte_limit"])
    for name in ("stored_rows", "stored_bytes", "promised_bytes", "segment_bytes"):
        yield Metric(name, (), report[name])
    for partition, state in report["partitions"].items():
        yield from _of_partition((("partition", partition),), state)
    for consumer, state in report["consumers"].items():
        yield from _of_consumer((("consumer", consumer),), state)
    for reason, rows in report["ended"].items():
        yield Metric("ended_rows_total", (("reason", reason),), rows)
    waiting: dict[tuple[str, str], int] = {}
    for waiter in report["waiters"]:
        what = (waiter["verb"], _DIGITS.split(waiter["for"])[0])
        waiting[what] = waiting.get(what, 0) + 1
    for (verb, reason), count in waiting.items():
        yield Metric("waiters", (("verb", verb), ("for", reason)), count)
    for producer, version in report["producers"].items():
        yield Metric("producer_version", (("producer", producer),), version)


def _of_partition(labels: tuple[tuple[str, str], ...], state: Mapping[str, Any]) -> Iterator[Metric]:
    yield Metric("partition_groups", labels, state["groups"])
    yield Metric("partition_unfinished_rows", labels, state["rows_unfinished"])
    yield Metric("partition_to_reserve_anew", labels, state["to_reserve_anew"])
    yield Metric("partition_oldest_seconds", labels, state["oldest_s"])
    for deadline, rows in state["outstanding"].items():
        yield Metric("outstanding_rows", (*labels, ("deadline", str(deadline))), rows)


def _of_consumer(labels: tuple[tuple[str, str], ...], state: Mapping[str, Any]) -> Iterator[Metric]:
    for name in ("reserved", "ready", "leased"):
        yield Metric("consumer_rows", (*labels, ("state", name)), state[name])
    yield Metric("consumer_done_total", labels, state["done"])
    yield Metric("consumer_redelivered_total", labels, state["redelivered"])


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return repr(round(value, 6)) if isinstance(value, float) else str(value)
