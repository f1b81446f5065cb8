"""Nonsense against a shard that is a process of its own, over a real socket.

FLOWRL_FUZZ=100000 sends that many messages; FLOWRL_FUZZ_SEED draws others.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import typing
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import zmq

from transfer_queue import errors, wire
from transfer_queue.client import QueueClient
from transfer_queue.errors import RowRefused
from transfer_queue.frames import DTYPES, pack
from transfer_queue.rows import Column, RowKey
from transfer_queue.spans import Span

ROOT = Path(__file__).resolve().parents[2]
NUM_MESSAGES = int(os.environ.get("FLOWRL_FUZZ", "10000"))
SEED = int(os.environ.get("FLOWRL_FUZZ_SEED", "0"))
BYTE_LIMIT = 16 << 20
MAX_MESSAGE_BYTES = 1 << 20
WINDOW = 200
MORE_BYTES_THAN_AT_FIRST = BYTE_LIMIT + (100 << 20)
CONSUMERS = {
    "reward": {"columns": ["tokens"]},
    "train": {"columns": ["tokens", "reward"], "training": True},
    "plain": {"columns": ["x"], "partition": "plain", "unit": "group"},
    "keeper": {"columns": ["kept"], "partition": "kept"},
}
INTEGERS = (0, 0, 0, 1, 1, 2, 3, 7, -1, 255, 1 << 20, (1 << 20) + 1, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63))
TEXTS = ("train", "plain", "reward", "tokens", "x", "p", "q", "", "late", "int8", "int32", "int64", "float64", "object",
         "../0.1", "0.1", "\0", "a" * 5000, "ü")  # fmt: skip
REALS = (0.0, 0.0, 0.01, -1.0, float("nan"), float("inf"), 1e7)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Its endpoint and its process."""
    settings = {
        "endpoint": f"ipc://{tmp_path}/shard", "consumers": CONSUMERS, "byte_limit": BYTE_LIMIT,
        "max_message_bytes": MAX_MESSAGE_BYTES, "batch_rows": 4, "max_staleness": 1,
        "segment_dir": str(tmp_path / "segments"),
    }  # fmt: skip
    (tmp_path / "queue.json").write_text(json.dumps(settings))
    with ExitStack() as stack:
        log = stack.enter_context((tmp_path / "log").open("w+"))
        process = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "transfer_queue.cli", "serve", "--config", str(tmp_path / "queue.json")],
                stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        )  # fmt: skip
        stack.callback(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving ")
        yield f"ipc://{tmp_path}/shard", psutil.Process(process.pid)
        assert process.poll() is None, f"the shard has ended: {(tmp_path / 'log').read_text()[-2000:]}"


# What is sent


def any_value(dice: random.Random, kind: Any) -> Any:
    """Something of that annotation, likely or not."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in arguments:
        return (
            None if dice.random() < 0.5 else any_value(dice, dice.choice([a for a in arguments if a is not type(None)]))
        )
    if origin is list:
        return [any_value(dice, arguments[0]) for _ in range(dice.choice((0, 1, 1, 2, 3)))]
    if origin is tuple:
        return [any_value(dice, argument) for argument in arguments]
    if kind is Span and dice.random() < 0.5:
        first = dice.randrange(3)
        return [
            dice.choice(("train", "plain")),
            dice.randrange(6),
            dice.randrange(2),
            first,
            first + dice.randrange(1, 3),
        ]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return [any_value(dice, of) for of in typing.get_type_hints(kind).values()]
    if kind is RowKey:
        return ["train", dice.randrange(6), dice.randrange(3), 0]
    choices: dict[Any, Sequence[Any]] = {int: INTEGERS, str: TEXTS, float: REALS, bool: (True, False)}
    return dice.choice(choices[kind]) if kind in choices else dice.randbytes(dice.randrange(20))


def any_request(dice: random.Random) -> list[bytes]:
    """Rightly framed, with fields of the right kinds and of any value."""
    kind = dice.choice(typing.get_args(wire.Request))
    hints = typing.get_type_hints(kind)
    fields = [any_value(dice, hints[name]) for name in kind.__struct_fields__]
    fields[0] = dice.randrange(1, 1 << 31)
    frames = [wire.MAGIC + msgspec.msgpack.encode([kind.__name__, *fields])]
    if kind is wire.Put:
        frames += [dice.randbytes(dice.choice((0, 4, 8, 16, 24))) for _ in range(dice.randrange(3))]
    return frames


def good_put(dice: random.Random) -> list[bytes]:
    rows = dice.randrange(1, 3)
    kept = dice.choice(("int32", "int8"))
    plain = Column.ragged([[1] * dice.randrange(4) for _ in range(rows)], kept)
    column = Column.checked(plain.values, plain.offsets, np.dtype("int32"))
    headers, frames = pack({dice.choice(("tokens", "reward", "x")): column})
    span = Span(dice.choice(("train", "plain")), dice.randrange(99), 0, 0, rows)
    put = wire.Put(dice.randrange(1, 1 << 31), [span], headers, [0] * rows)
    return [wire.encode(put), *(bytes(frame) for frame in frames)]


def sane(dice: random.Random) -> list[bytes]:
    """What an honest client says, so that nonsense meets rows in every state."""
    number = dice.randrange(1, 1 << 31)
    spans = [Span("plain", dice.randrange(99), 0, 0, 2)]
    return [
        wire.encode(
            dice.choice(
                (
                    wire.Announce(number, "p", 0),
                    wire.Reserve(number, "p", 1, 2, dice.choice(("train", "plain")), 64, 0.0),
                    wire.Take(number, dice.choice(("reward", "plain")), 4, None, None, 0, 0.0),
                    wire.Take(number, "train", 4, None, 0, 0, 0.0),
                    wire.Ack(number, "plain", spans),
                    wire.Commit(number, 0, 0, spans),
                )
            )
        )
    ]


def mutated(dice: random.Random, frames: list[bytes]) -> list[bytes]:
    """A byte, a frame or an end is wrong."""
    frames = list(frames)
    at = dice.randrange(len(frames))
    kind = dice.randrange(5)
    if kind == 0 and frames[at]:
        place = dice.randrange(len(frames[at]))
        frames[at] = frames[at][:place] + dice.randbytes(1) + frames[at][place + 1 :]
    elif kind == 1:
        frames[at] = frames[at][: dice.randrange(len(frames[at]) + 1)]
    elif kind == 2:
        frames.insert(at + 1, dice.randbytes(8))
    elif kind == 3:
        del frames[at]
    else:
        frames[at] += dice.randbytes(dice.choice((1, 3, 1000)))
    return frames or [b""]


def nonsense(dice: random.Random) -> list[bytes]:
    luck = dice.random()
    if luck < 0.1:
        return [dice.randbytes(dice.randrange(60)) for _ in range(dice.randrange(1, 4))]
    frames = any_request(dice) if luck < 0.5 else good_put(dice) if luck < 0.75 else sane(dice)
    return mutated(dice, frames) if dice.random() < 0.4 else frames


# The tests


def test_shard_answers_nonsense_by_typed_errors_and_keeps_serving(server: tuple[str, psutil.Process]) -> None:
    endpoint, process = server
    dice = random.Random(SEED)
    answers: Counter[str] = Counter()
    with (
        QueueClient(endpoint, timeout_s=60.0) as client,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as socket,
    ):
        (kept,) = client.reserve("keeper", 1, 2, partition="kept")
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        at_first = process.memory_info().rss
        for number in range(NUM_MESSAGES):
            socket.send_multipart(nonsense(dice))
            while socket.poll(0):
                answers[kind_of(socket.recv_multipart())] += 1
            if number % WINDOW == 0:
                client.introspect()
                grown = process.memory_info().rss - at_first
                assert grown < MORE_BYTES_THAN_AT_FIRST, f"{grown >> 20} MiB more after {number} messages"
        values = np.arange(7, dtype=np.int32)
        client.put(kept.keys, {"kept": Column.ragged([values, values[:3]], "int32")})
        rows = client.take("keeper", 9, wait_s=10.0).rows
        assert rows.keys == list(kept.keys)
        assert rows["kept"][0].tolist() == values.tolist()
        assert client.ack("keeper", rows.keys) == 2
    assert answers["RowRefused"] > NUM_MESSAGES / 50 and answers["WireError"] > NUM_MESSAGES / 50
    assert min(answers[kind] for kind in ("Reserved", "Stored", "Delivered", "Done")) > 10, "some of it made sense"


def kind_of(frames: list[bytes]) -> str:
    """Of an answer. Whatever was sent, it is one of the protocol's, and an error one of ours."""
    reply = wire.decode_reply(memoryview(frames[0]))
    if not isinstance(reply, wire.Refused):
        return type(reply).__name__
    assert reply.error in (*(kind.__name__ for kind in errors.QueueError.__subclasses__()), "DuplicateRow"), reply
    assert reply.message
    return reply.error


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"tokens": Column.scalars([1.0], "complex128")}, r"columns: 'tokens' is complex128; what travels is bool"),
        ({"tokens": Column(np.array(["a"], dtype=object), np.array([0, 1]))}, r"columns: 'tokens' is object"),
        ({"tokens": Column.scalars([1.0], "float64")}, r"columns: 'tokens' is float64; it came as int32 before"),
        ({"tokens": Column.ragged([np.zeros(BYTE_LIMIT, np.int8)], "int8")}, r"max_message_bytes"),
        ({}, r"columns: none"),
    ],
)  # fmt: skip
def test_put_that_cannot_be_is_refused_by_name_and_stores_nothing(
    server: tuple[str, psutil.Process], columns: dict[str, Column], words: str
) -> None:
    endpoint, process = server
    with QueueClient(endpoint, timeout_s=20.0) as client:
        client.announce("p", 0)
        first, second = client.reserve("p", 2, 1)
        client.put(first.keys, {"tokens": Column.scalars([1], "int32")}, versions=[0])
        stored = client.introspect()[endpoint]["stored_bytes"]
        at_first = process.memory_info().rss
        with pytest.raises((errors.QueueError, ValueError), match=words):
            client.put(second.keys, columns, versions=[0])
        assert client.introspect()[endpoint]["stored_bytes"] == stored
        assert process.memory_info().rss - at_first < 8 << 20
        assert client.put(second.keys, {"tokens": Column.scalars([2], "int32")}, versions=[0]) == 1


def test_rows_that_cannot_be_are_refused_by_name(server: tuple[str, psutil.Process]) -> None:
    with QueueClient(server[0], timeout_s=20.0) as client:
        client.announce("p", 0)
        (group,) = client.reserve("p", 1, 2)
        column = {"tokens": Column.scalars([1], "int32")}
        for key, words in (
            (RowKey("nowhere", 0, 0), "partition: 'nowhere'; consumers read"),
            (RowKey("train", group.group + 1, 0), "was never reserved here"),
            (RowKey("train", group.group, 2), "the group has 2 rows"),
            (RowKey("train", group.group, 0, attempt=5), "was never reserved here"),
        ):
            with pytest.raises(RowRefused, match=words):
                client.put([key], column, versions=[0])
        with pytest.raises(RowRefused, match=r"versions: .* reserved at 0"):
            client.put(group.keys[:1], column, versions=[-1])
        with pytest.raises(RowRefused, match="row_bytes: a group of"):
            client.reserve("p", 1, 2, row_bytes=BYTE_LIMIT)
        with pytest.raises(RowRefused, match="group_size: 3; must divide"):
            client.reserve("p", 1, 3)


def test_rows_that_promise_no_bytes_do_not_fill_the_memory(server: tuple[str, psutil.Process]) -> None:
    endpoint, process = server
    with QueueClient(endpoint, timeout_s=60.0) as client:
        at_first = process.memory_info().rss
        for size in (1, 7, 1000):
            while client.reserve("greedy", (1 << 20) // size, size, partition="plain", wait_s=0.0):
                pass
        assert process.memory_info().rss - at_first < 4 * BYTE_LIMIT
        with pytest.raises(RowRefused, match="group_size: 1048576; the ledger alone"):
            client.reserve("greedy", 1, 1 << 20, partition="plain", wait_s=0.0)
        client.producer_lost("greedy")
        assert len(client.reserve("p", 5, 2, partition="plain", wait_s=5.0)) == 5


def test_every_dtype_that_travels_arrives_as_it_was(server: tuple[str, psutil.Process]) -> None:
    with QueueClient(server[0], timeout_s=20.0) as client:
        (group,) = client.reserve("p", 1, 1, partition="plain")
        columns = {name: Column.ragged([np.arange(5).astype(dtype)], dtype.str) for name, dtype in DTYPES.items()}
        client.put(group.keys, columns)
        client.put(group.keys, {"x": Column.scalars([0], "int8")})
        assert client.introspect()[server[0]]["stored_rows"] == 1
