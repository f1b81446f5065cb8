"""What a ledger holds, in counts: for `introspect`, for metrics, and for what outlives it. Consumes nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

from transfer_queue.lanes import Lane
from transfer_queue.ledger import Ledger
from transfer_queue.partitions import Partition
from transfer_queue.states import PENDING


def describe(ledger: Ledger, now: float) -> dict[str, Any]:
    """By consumer and partition. Walks the live groups."""
    return {
        "partitions": {name: _of_partition(partition, now) for name, partition in ledger.partitions.items()},
        "consumers": {name: _of_lane(ledger, lane) for name, lane in ledger.lanes.items()},
        "ended": dict(ledger.ended),
        "promised_bytes": ledger.promised_bytes,
    }


def outstanding(partition: Partition) -> dict[int, int]:
    """Rows by deadline that the staleness accounts count for this shard: reserved or ready, in no update."""
    rows: Counter[int] = Counter()
    for group in partition.groups.values() if partition.training is not None else ():
        if group.claim in (None, PENDING):
            rows[group.deadline] += group.size
    return dict(rows)


def _of_partition(partition: Partition, now: float) -> dict[str, Any]:
    groups = partition.groups.values()
    return {
        "groups": len(groups),
        "rows_unfinished": sum(group.size - group.filled.bit_count() for group in groups),
        "to_reserve_anew": sum(map(len, partition.again.values())),
        "next_group": partition.next_group,
        "group_stride": partition.group_stride,
        "group_size": partition.group_size,
        "open": partition.open_groups(),
        "outstanding": outstanding(partition),
        "oldest_s": max((now - group.born_s for group in groups), default=0.0),
    }


def _of_lane(ledger: Ledger, lane: Lane) -> dict[str, int]:
    reserved = ready = leased = 0
    for group in ledger.partitions[lane.spec.partition].groups.values():
        progress = group.progress[lane.position]
        reserved += group.size - progress.begun.bit_count()
        ready += progress.ready.bit_count()
        leased += progress.leased.bit_count()
    return {
        "reserved": reserved,
        "ready": ready,
        "leased": leased,
        "done": lane.done,
        "redelivered": lane.redelivered,
    }
