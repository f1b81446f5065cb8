"""A queue is saved, and goes on in another number of shards."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.transfer_queue.conftest import CONSUMERS, DirectShard
from transfer_queue import wire
from transfer_queue.clock import LocalClock
from transfer_queue.config import QueueConfig
from transfer_queue.rows import Column, RowKey
from transfer_queue.saved import SavedQueue
from transfer_queue.spans import keys_of, spans_of
from transfer_queue.staleness import Accounts


def shards(
    directory: Path, count: int, accounts: Accounts, restore: Path | None = None, life: int = 0
) -> list[DirectShard]:
    made = []
    for first in range(count):
        config = QueueConfig(
            endpoint=f"ipc://{directory}/{first}", consumers=CONSUMERS, first_group=first, group_stride=count,
            save_dir=str(directory), restore_dir=str(restore) if restore else "", life=life,
        )  # fmt: skip
        made.append(DirectShard(config, LocalClock(accounts)))
        made[-1].pass_time(0.0)
    return made


def run(queue: list[DirectShard], version: int) -> None:
    for shard in queue:
        shard.announce("p", version)


def put(shard: DirectShard, keys: list[RowKey], name: str = "tokens") -> None:
    columns = {name: Column.scalars([key.group + 0.5 * key.index for key in keys], "float32")}
    reply = shard.ask(wire.Put, spans_of(keys), [], [], columns=columns)
    assert isinstance(reply, wire.Stored), reply


def save(queue: list[DirectShard], directory: Path) -> int:
    return sum(shard.ask(wire.Save, str(directory)).count for shard in queue)


@pytest.mark.parametrize("later", [1, 2, 3, 5])
def test_a_saved_queue_goes_on_in_any_number_of_shards(tmp_path: Path, later: int) -> None:
    accounts = Accounts(4, 3)
    queue = shards(tmp_path, 2, accounts)
    run(queue, 0)
    reserved: list[list[wire.Reservation]] = [queue[0].reserve(groups=3, size=2), queue[1].reserve(groups=2, size=2)]
    finished = [key for shard in reserved for group in shard[:2] for key in group.keys]
    for at, shard in enumerate(queue):
        mine = [key for key in finished if key.group % 2 == at]
        put(shard, mine)
        put(shard, mine, "reward")
    done = queue[0].take("reward", 2).keys
    queue[0].ask(wire.Ack, "reward", done)
    assert save(queue, tmp_path / "saved") == len(finished)

    fresh = Accounts(4, 3, awaited_shards=later)
    again = shards(tmp_path, later, fresh, tmp_path / "saved")
    assert fresh.awaited_shards == 0
    assert fresh.outstanding == {3: len(finished)}
    taken: list[RowKey] = []
    for shard in again:
        reply = shard.take("reward", 100)
        taken += reply.keys if isinstance(reply, wire.Delivered) else []
    assert sorted(taken) == sorted(set(finished) - set(done))
    run(again, 0)
    wanted = {reserved[0][2].group: 1, 5: 0}
    for number, attempt in wanted.items():
        (group,) = again[number % later].reserve(groups=1, size=2)
        assert (group.group, group.attempt) == (number, attempt), "what was open comes before new numbers"
    (group,) = again[0].reserve(groups=1, size=2)
    assert group.group >= 6


def test_what_no_longer_fits_under_the_bound_is_reserved_anew(tmp_path: Path) -> None:
    queue = shards(tmp_path, 1, Accounts(2, 0))
    run(queue, 0)
    (first,) = queue[0].reserve(groups=1)
    put(queue[0], list(first.keys))
    save(queue, tmp_path / "saved")
    (header,) = SavedQueue(tmp_path / "saved").shards
    assert [group.number for group in header.groups] == [first.group]
    late = Accounts(2, 0, version=1)
    (shard,) = shards(tmp_path, 1, late, tmp_path / "saved")
    assert late.outstanding == {}
    run([shard], 1)
    assert [(group.group, group.attempt) for group in shard.reserve(groups=1)] == [(first.group, 1)]


def test_payload_is_the_same_byte_for_byte(tmp_path: Path) -> None:
    queue = shards(tmp_path, 1, Accounts(4, 0))
    run(queue, 0)
    groups = queue[0].reserve(groups=2, size=2)
    keys = keys_of([group.span for group in groups])
    columns = {
        "tokens": Column.ragged([[1, 2, 3], [], [4], [5, 6]], "int64"),
        "note": Column.scalars([1, 2, 3, 4], "uint8"),
    }
    queue[0].ask(wire.Put, spans_of(keys), [], [0] * 4, columns=columns)
    save(queue, tmp_path / "saved")
    (shard,) = shards(tmp_path, 1, Accounts(4, 0), tmp_path / "saved")
    got = shard.shard._core.storage.gather(spans_of(keys), ("tokens", "note"))
    for name, column in columns.items():
        assert got[name].values.tolist() == column.values.tolist()
        assert got[name].offsets.tolist() == column.offsets.tolist()


@pytest.mark.parametrize("harm", ["torn", "missing", "none", "foreign"])
def test_what_is_not_a_whole_saved_queue_is_refused_by_name(tmp_path: Path, harm: str) -> None:
    queue = shards(tmp_path, 2, Accounts(4, 3))
    run(queue, 0)
    put(queue[0], list(queue[0].reserve(groups=1)[0].keys))
    saved = tmp_path / "saved"
    save(queue, saved)
    files = sorted(saved.iterdir())
    if harm == "torn":
        files[0].write_bytes(files[0].read_bytes()[:-1])
    elif harm == "missing":
        files[0].unlink()
    elif harm == "none":
        saved = tmp_path / "nowhere"
    else:
        files[0].write_bytes(b"something else altogether")
    with ExitStack(), pytest.raises(ValueError, match=r"restore_dir: "):
        shards(tmp_path, 1, Accounts(4, 3), saved)


@pytest.mark.parametrize("directory", ["..", "/", "below/../../beside", "/etc"])
def test_a_save_outside_the_shards_own_folder_is_refused_by_name(tmp_path: Path, directory: str) -> None:
    (shard,) = shards(tmp_path / "own", 1, Accounts(4, 0))
    reply: Any = shard.ask(wire.Save, directory)
    assert reply.error == "RowRefused" and repr(directory) in reply.message and "save_dir" in reply.message
    assert not list(tmp_path.rglob("shard-*"))


def test_a_shard_without_such_a_folder_saves_nothing(tmp_path: Path, direct_shard: Any) -> None:
    reply: Any = direct_shard().ask(wire.Save, str(tmp_path))
    assert reply.error == "RowRefused" and "this shard has no save_dir" in reply.message


def test_a_save_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    (shard,) = shards(tmp_path, 1, Accounts(4, 0))
    (tmp_path / "file").write_text("in the way")
    reply: Any = shard.ask(wire.Save, str(tmp_path / "file" / "below"))
    assert (reply.error, "directory" in reply.message) == ("RowRefused", True)


def test_a_queue_saved_without_rows_has_its_open_groups_sampled_anew(tmp_path: Path) -> None:
    accounts = Accounts(4, 1)
    (shard,) = shards(tmp_path, 1, accounts)
    run([shard], 0)
    groups = shard.reserve(groups=3, size=2)
    for name in ("tokens", "reward", "advantage"):
        put(shard, [key for group in groups[:2] for key in group.keys], name)
    taken = shard.take("train", 2, update=0)
    shard.ask(wire.Commit, 0, 0, taken.keys)
    assert shard.ask(wire.Save, str(tmp_path / "saved"), False).count == 0
    again = Accounts(4, 1, version=1, awaited_shards=1)
    (later,) = shards(tmp_path, 1, again, tmp_path / "saved", life=1)
    assert again.outstanding == {} and again.awaited_shards == 0
    run([later], 1)
    done = {key.group for key in taken.keys}
    wanted = sorted({group.group for group in groups} - done)
    assert [(group.group, group.attempt) for group in later.reserve(groups=len(wanted), size=2)] == [
        (number, 1000) for number in wanted
    ]


def test_a_row_of_an_earlier_life_that_is_given_up_gets_a_key_that_was_never_used(tmp_path: Path) -> None:
    """The earlier life may have tried the group again, after it was saved."""
    (shard,) = shards(tmp_path, 1, Accounts(4, 3))
    run([shard], 0)
    (group,) = shard.reserve(groups=1, size=2)
    put(shard, list(group.keys))
    save([shard], tmp_path / "saved")
    (later,) = shards(tmp_path, 1, Accounts(4, 3, awaited_shards=1), tmp_path / "saved", life=2)
    later.ask(wire.Drop, list(group.keys), "unwanted", True)
    run([later], 0)
    assert [(found.group, found.attempt) for found in later.reserve(groups=1, size=2)] == [(group.group, 2000)]
