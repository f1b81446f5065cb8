"""The rule as arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer_queue.staleness import Accounts


def test_synchronous_run_admits_exactly_one_update() -> None:
    accounts = Accounts(batch_rows=4, max_staleness=0)
    assert accounts.admit_groups(deadline=0, rows=1, groups=10) == 4
    for _ in range(4):
        accounts.claim(0, 1)
    assert (accounts.version, accounts.filled) == (1, 0)
    assert not accounts.admissible(0, 1), "a row of version 0 has no update left to be in"
    assert accounts.admissible(1, 4)


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4])
def test_first_version_may_fill_all_updates_up_to_its_deadline(max_staleness: int) -> None:
    accounts = Accounts(4, max_staleness)
    assert accounts.admit_groups(max_staleness, 2, 100) == 2 * (max_staleness + 1)


def test_younger_row_leaves_room_for_those_due_before_it() -> None:
    accounts = Accounts(4, 1)
    accounts.admit_groups(1, 1, 8)
    for _ in range(4):
        accounts.claim(1, 1)
    assert accounts.admit_groups(2, 1, 8) == 4
    assert accounts.outstanding == {1: 4, 2: 4}
    assert not accounts.claimable(2, 1)
    assert accounts.blocked_at(2, 1) == 1
    accounts.retire(1, 1)
    assert accounts.claimable(2, 1)


def test_row_whose_tokens_are_younger_than_reserved_makes_room() -> None:
    accounts = Accounts(4, 1, version=1)
    accounts.admit_groups(1, 4, 1)
    assert not accounts.admissible(1, 4)
    accounts.shift(1, 2, 4)
    assert accounts.admissible(1, 4)


def test_deadline_beyond_the_future_is_refused() -> None:
    assert not Accounts(4, 1).admissible(2, 1)


def test_changes_move_when_somebody_may_be_helped_and_not_by_a_claim() -> None:
    accounts = Accounts(4, 1)
    accounts.admit_groups(1, 1, 3)
    accounts.claim(1, 1)
    assert accounts.changes == 0
    accounts.retire(1, 1)
    assert accounts.changes == 1


@pytest.mark.parametrize(
    ("field", "values"), [("batch_rows", (0, 1)), ("max_staleness", (4, -1)), ("surplus_rows", (4, 1, 0, 0, 0, -1))]
)
def test_bad_bounds_are_refused_by_name(field: str, values: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=field):
        Accounts(*values)


def test_surplus_is_admitted_beyond_the_update_and_overdue_when_it_is_full() -> None:
    accounts = Accounts(4, 0, surplus_rows=2)
    assert accounts.admit_groups(deadline=0, rows=1, groups=10) == 6
    for _ in range(4):
        accounts.claim(0, 1)
    assert (accounts.version, accounts.outstanding) == (1, {0: 2})
    assert not accounts.claimable(0, 1), "its deadline has passed"
    assert not accounts.admissible(0, 1)
    accounts.retire(0, 2)
    assert accounts.admit_groups(1, 1, 10) == 6


def test_surplus_is_kept_for_a_later_update_while_its_deadline_allows() -> None:
    accounts = Accounts(4, 1, surplus_rows=2)
    assert accounts.admit_groups(1, 1, 20) == 10
    for _ in range(4):
        accounts.claim(1, 1)
    assert accounts.outstanding == {1: 6} and accounts.claimable(1, 1)
    assert accounts.admit_groups(2, 1, 20) == 4, "beside what is left, an update's worth"


def test_an_update_never_holds_surplus() -> None:
    accounts = Accounts(4, 0, surplus_rows=4)
    accounts.admit_groups(0, 1, 8)
    for _ in range(3):
        accounts.claim(0, 1)
    assert not accounts.claimable(0, 2) and accounts.claimable(0, 1)


def test_an_update_ends_short_whatever_surplus_is_left() -> None:
    accounts = Accounts(4, 0, surplus_rows=2)
    accounts.admit_groups(0, 1, 4)
    accounts.claim(0, 1)
    assert not accounts.close(0, 0), "three are due, and two may be left over"
    accounts.claim(0, 1)
    assert accounts.close(0, 0) and accounts.version == 1


@given(
    st.integers(0, 4), st.sampled_from([0, 2, 6]),
    st.lists(st.tuples(st.sampled_from("aaccrso"), st.integers(0, 9)), max_size=80),
)  # fmt: skip
def test_whatever_is_granted_the_rule_holds_and_the_earliest_deadline_is_claimable(
    max_staleness: int, surplus: int, steps: list[tuple[str, int]]
) -> None:
    """a: admit two rows, c: claim, r: retire, s: shift, with the deadline as a choice among those possible; o: retire
    what is overdue, which shards do when they have heard of it."""
    accounts = Accounts(4, max_staleness, surplus_rows=surplus)
    for kind, choice in steps:
        due = sorted(accounts.outstanding)
        if kind == "a":
            accounts.admit_groups(accounts.version + choice % (max_staleness + 1), 2, 1)
        elif due and kind == "c" and accounts.claimable(due[choice % len(due)], 2):
            accounts.claim(due[choice % len(due)], 2)
        elif due and kind == "r":
            accounts.retire(due[choice % len(due)], 2)
        elif due and kind == "s":
            accounts.shift(due[choice % len(due)], accounts.version + max_staleness, 2)
        elif kind == "o":
            for deadline in [deadline for deadline in due if deadline < accounts.version]:
                accounts.retire(deadline, accounts.outstanding[deadline])
        for d in range(accounts.version - 1, accounts.version + max_staleness + 2):
            filled = accounts.filled if d >= accounts.version else 0
            assert accounts.due_by(d) + filled <= (d - accounts.version + 1) * 4 + surplus
        assert accounts.filled < 4
        still_due = [deadline for deadline in accounts.outstanding if deadline >= accounts.version]
        assert not still_due or accounts.claimable(min(still_due), 2)
