"""Of a record with several lives, the updates that count are those that no later life has undone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flowrl.replay.lineage import Lineage
from flowrl.replay.record import RECORD_DIR, Beginning, RecordWriter, digests
from flowrl.trainer.parcel import Parcel
from transfer_queue.rows import Column, RowKey, Rows


def rows(group: int) -> Rows:
    columns = {
        "response_tokens": Column.ragged([[group, 1], []], "int32"),
        "reward": Column.scalars([0.5, 1.0], "float32"),
    }
    return Rows([RowKey("train", group, index) for index in range(2)], columns, [3, 4])


def write_life(run: Path, life: int, first: int, end: int, rank: int = 0, world_size: int = 1) -> Path:
    beginning = Beginning(
        rank=rank, world_size=world_size, life=life, step=first, device="cpu", threads=1, versions={"torch": "2"}
    )  # fmt: skip
    with RecordWriter(run / RECORD_DIR, beginning) as record:
        for update in range(first, end):
            record.consumed(update, rows(100 * life + update))
            record.updated(update, {"w": torch.full((2, 2), float(100 * life + update))})
    return run / RECORD_DIR / f"rank{rank}.life{life}"


def groups(run: Path) -> list[int]:
    return [update.batches[0].keys[0].group for update in Lineage(run, 0).updates()]


def test_what_a_record_gives_back_is_what_it_was_given(tmp_path: Path) -> None:
    write_life(tmp_path, 0, 0, 2)
    first = next(iter(Lineage(tmp_path, 0).updates()))
    assert first.batches[0].keys == rows(0).keys and first.batches[0].versions == [3, 4]
    for name, column in rows(0).columns.items():
        np.testing.assert_array_equal(first.batches[0][name].values, column.values)
        np.testing.assert_array_equal(first.batches[0][name].offsets, column.offsets)
        assert first.batches[0][name].values.dtype == column.values.dtype
    assert first.digests == digests({"w": torch.zeros(2, 2)})


def test_rows_without_any_column_value_survive_a_parcel() -> None:
    assert Parcel.of(Rows([], {})).rows().keys == []


def test_a_later_life_counts_from_where_it_began(tmp_path: Path) -> None:
    write_life(tmp_path, 0, 0, 5)
    write_life(tmp_path, 1, 3, 6)
    write_life(tmp_path, 2, 3, 4)
    write_life(tmp_path, 3, 4, 4)
    assert groups(tmp_path) == [0, 1, 2, 203]
    assert Lineage(tmp_path, 0).steps == 4


def test_a_life_that_began_anew_undoes_all_before_it(tmp_path: Path) -> None:
    write_life(tmp_path, 0, 0, 5)
    write_life(tmp_path, 1, 0, 2)
    assert groups(tmp_path) == [100, 101]


def test_an_entry_that_was_not_finished_is_left_out(tmp_path: Path) -> None:
    path = write_life(tmp_path, 0, 0, 3)
    path.write_bytes(path.read_bytes()[:-3])
    assert groups(tmp_path) == [0, 1]


def test_a_gap_is_refused(tmp_path: Path) -> None:
    write_life(tmp_path, 0, 0, 2)
    write_life(tmp_path, 1, 3, 5)
    with pytest.raises(ValueError, match="ends at 2; the next life began at 3"):
        Lineage(tmp_path, 0)


def test_lives_of_different_world_sizes_are_refused(tmp_path: Path) -> None:
    write_life(tmp_path, 0, 0, 2)
    write_life(tmp_path, 1, 2, 4, world_size=2)
    with pytest.raises(ValueError, match=r"trained by \[1, 2\] ranks"):
        Lineage(tmp_path, 0)
