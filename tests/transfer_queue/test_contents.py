"""Which rows have which columns, against the plainest bookkeeping; and columns joined, against row by row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer_queue.contents import MOST_KINDS, Contents, KnownNames
from transfer_queue.rows import Column, concatenate

NAMES = st.frozensets(st.sampled_from("abcd"), min_size=1)
ROWS = st.integers(0, 63)


@given(st.lists(st.tuples(NAMES, ROWS), max_size=8), NAMES)
def test_contents_are_those_of_a_set_of_columns_for_each_row(puts: list[tuple[frozenset[str], int]], asked) -> None:
    contents = Contents()
    plain: list[set[str]] = [set() for _ in range(6)]
    for names, rows in puts:
        contents.add(names, rows)
        for row in range(6):
            plain[row] |= names if rows >> row & 1 else set()

    def bits(rows: list[bool]) -> int:
        return sum(has << row for row, has in enumerate(rows))

    assert contents.with_all(asked) == bits([asked <= have for have in plain])
    assert contents.with_any(asked) == bits([bool(asked & have) for have in plain])
    found = dict(contents.columns())
    for name in "abcd":
        assert found.get(name, 0) == bits([name in have for have in plain])


def test_equal_names_are_one_set_and_no_more_are_kept_than_the_limit() -> None:
    known = KnownNames()
    first = known.of(["a", "b"])
    assert known.of(("b", "a")) is first
    for number in range(2 * MOST_KINDS):
        known.of([str(number)])
    assert len(known._known) <= MOST_KINDS


@given(st.data())
def test_joined_columns_have_the_rows_of_their_parts_in_order(data: st.DataObject) -> None:
    """Some columns share their offsets, some have others, some parts are empty."""
    num_parts = data.draw(st.integers(1, 4))
    num_rows = [data.draw(st.integers(0, 4)) for _ in range(num_parts)]
    lengths = st.integers(0, 3)
    shared = [Column.ragged([[0] * data.draw(lengths) for _ in range(rows)], "int64").offsets for rows in num_rows]
    parts: dict[str, list[Column]] = {}
    for name in data.draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=5, unique=True)):
        own = [Column.ragged([[0] * data.draw(lengths) for _ in range(rows)], "int64").offsets for rows in num_rows]
        offsets = data.draw(st.sampled_from([shared, own]))
        parts[name] = [Column(np.random.default_rng(0).integers(0, 9, one[-1]), one) for one in offsets]
    joined = (
        concatenate(parts, lambda count: np.empty(count, np.uint8)) if data.draw(st.booleans()) else concatenate(parts)
    )
    assert joined.keys() == parts.keys()
    for name, columns in parts.items():
        expected = [row.tolist() for column in columns for row in column]
        assert [row.tolist() for row in joined[name]] == expected
        assert all(joined[name].offsets is not column.offsets for column in columns), "a copy"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("int64", "float32"),
        ("int8", "uint8"),
        ("int64", "uint64"),
        ("int32", "float32"),
        ("int32", "int64"),
        ("float64", "float32"),
    ],
)
def test_parts_of_different_types_become_what_numpy_makes_of_them(one: str, other: str) -> None:
    most = [np.iinfo(dtype).max if dtype.startswith(("int", "uint")) else 0.5 for dtype in (one, other)]
    arrays = [np.array([1, value], dtype) for value, dtype in zip(most, (one, other), strict=True)]
    parts = [Column(array, np.array([0, 1, 2])) for array in arrays]
    for joined in (Column.concatenate(parts), concatenate({"x": parts}, is_wide=True)["x"]):
        assert joined.dtype == joined.values.dtype == np.concatenate(arrays).dtype
        assert np.array_equal(joined.values, np.concatenate(arrays))


def test_a_small_column_that_is_kept_keeps_nothing_else() -> None:
    large, small = np.zeros(1 << 20), np.zeros(4)
    parts = {"large": [Column(large, np.array([0, 1 << 20]))], "small": [Column(small, np.array([0, 4]))]}
    joined = concatenate(parts)
    assert joined["small"].values.base is None and joined["large"].values.base is not None
