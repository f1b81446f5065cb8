"""The cursor: from what shards tell to what other shards begin with. Every open group is somebody's, once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from transfer_queue.cursor import Cursor, cursor_of


@given(
    st.lists(st.tuples(st.integers(0, 12), st.sets(st.integers(0, 11))), min_size=1, max_size=4),
    st.integers(1, 5),
)
def test_every_open_group_is_given_to_one_shard_and_none_is_done_twice(
    shards: list[tuple[int, set[int]]], others: int
) -> None:
    stride = len(shards)
    told = []
    open_groups, done = set(), set()
    for first, (count, still_open) in enumerate(shards):
        mine = [first + stride * place for place in range(count)]
        left = [group for place, group in enumerate(mine) if place in still_open]
        told.append({"next_group": first + stride * count, "open": left, "group_stride": stride, "group_size": 4})
        open_groups.update(left)
        done.update(set(mine) - set(left))
    cursor = cursor_of(told)
    again, new = [], []
    for first in range(others):
        mine, next_group = cursor.open_groups(first, others)
        assert next_group >= first and (next_group - first) % others == 0
        again += mine
        new += [next_group + others * place for place in range(5)]
    assert len(set(again)) == len(again) and open_groups <= set(again)
    assert not done & {*again, *new}
    assert set(range(min(new), min(new) + 5)) <= set(new)
    assert {*done, *again} == set(range(cursor.end))


def test_a_cursor_of_nothing_begins_at_each_shards_first_group() -> None:
    assert [Cursor().open_groups(first, 3) for first in range(3)] == [([], 0), ([], 1), ([], 2)]


def test_what_was_reserved_and_done_after_the_cursor_is_not_done_again() -> None:
    cursor = Cursor(end=6, open=(1, 4), group_size=2).without([4, 7, 3])
    assert (cursor.end, cursor.open, cursor.group_size) == (8, (1, 6), 2)
    assert [cursor.open_groups(first, 2) for first in (0, 1)] == [([6], 8), ([1], 9)]
