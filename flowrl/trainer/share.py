"""A rank's share of a whole batch, the same whichever rank took which rows, and about as many tokens as any other's.

Ranks exchange what they took, sort it by key, and each keeps its groups. A few megabytes an update, over gloo. For
updates that must be repeatable, and those that wait for their batch anyway.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import torch
import torch.distributed as dist

from flowrl.trainer.parcel import Parcel
from flowrl.trainer.world import World
from transfer_queue.rows import RowKey, Rows
from transfer_queue.sampling import balanced_partition

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Parcel).decode


def balanced_share(parts: Iterable[Rows], world: World) -> Rows:
    """On every rank, with what it took of one batch: the rows of its groups, whole, in the order of keys."""
    taken = list(parts)
    everybody = exchange(Rows.concatenate(taken) if taken else Rows([], {}), world)
    whole = [rows for rows in everybody if len(rows)]
    if not whole:
        return Rows([], {})
    batch = Rows.concatenate(whole)
    length_B = batch["prompt_tokens"].lengths + batch["response_tokens"].lengths
    tokens_of: dict[tuple[str, int, int], int] = {}
    order = sorted(range(len(batch)), key=lambda index: batch.keys[index])
    for index in order:
        group = _group(batch.keys[index])
        tokens_of[group] = tokens_of.get(group, 0) + int(length_B[index])
    groups = list(tokens_of)
    mine = {groups[place] for place in balanced_partition(list(tokens_of.values()), world.size)[world.rank]}
    kept = [index for index in order if _group(batch.keys[index]) in mine]
    return batch.select(kept) if kept else Rows([], {})


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
