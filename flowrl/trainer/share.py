"""A rank's share of a whole batch, the same whichever rank took which rows, and about as many tokens as any other's.

Ranks exchange what they took, sort it by key, and each keeps its groups. A few megabytes an update, over gloo. For
updates that must be repeatable, those that wait for their batch anyway, and stages that want all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
import torch
import torch.distributed as dist

from flowrl.trainer.parcel import Parcel
from flowrl.trainer.world import World
from transfer_queue.rows import RowKey, Rows
from transfer_queue.sampling import balanced_partition

NO_ROWS = Rows([], {})
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Parcel).decode


def whole_batch(parts: Iterable[Rows], world: World) -> Rows:
    """On every rank, with what it took of one batch: all of it, in the order of keys."""
    taken = list(parts)
    everybody = exchange(Rows.concatenate(taken) if taken else NO_ROWS, world)
    filled = [rows for rows in everybody if len(rows)]
    if not filled:
        return NO_ROWS
    batch = Rows.concatenate(filled)
    return batch.select(sorted(range(len(batch)), key=lambda index: batch.keys[index]))


def balanced_share(batch: Rows, world: World) -> Rows:
    """On every rank, of a batch that all have: the rows of its groups, whole."""
    if not len(batch):
        return NO_ROWS
    length_B = batch["prompt_tokens"].lengths + batch["response_tokens"].lengths
    tokens_of: dict[tuple[str, int, int], int] = {}
    for key, length in zip(batch.keys, length_B.tolist(), strict=True):
        tokens_of[_group(key)] = tokens_of.get(_group(key), 0) + length
    groups = list(tokens_of)
    mine = {groups[place] for place in balanced_partition(list(tokens_of.values()), world.size)[world.rank]}
    kept = [index for index, key in enumerate(batch.keys) if _group(key) in mine]
    return batch.select(kept) if kept else NO_ROWS


def with_columns_of_first(batch: Rows, make: Callable[[Rows], Rows], world: World) -> Rows:
    """On every rank, with a batch that all have: that and the columns which rank 0 makes of it, once for all."""
    made = exchange(make(batch) if world.rank == 0 else NO_ROWS, world)[0]
    return Rows(batch.keys, {**batch.columns, **made.columns}, batch.versions)


def exchange(rows: Rows, world: World) -> list[Rows]:
    """On every rank: the rows of all ranks, by rank."""
    return [_decode(content).rows() for content in _all_gather(_encode(Parcel.of(rows)), world)]


def _all_gather(content: bytes, world: World) -> list[bytes]:
    """Byte strings of unequal lengths, on the host: its backend is gloo also where gradients go over NCCL."""
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world.size)]
    dist.all_gather(sizes, torch.tensor([len(content)]))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    gathered = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(gathered, padded)
    return [found[: int(size)].numpy().tobytes() for found, size in zip(gathered, sizes, strict=True)]


def _group(key: RowKey) -> tuple[str, int, int]:
    return key.partition, key.group, key.attempt
