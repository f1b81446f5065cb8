"""The staleness rule as arithmetic on a few integers. Pure: no rows, no sockets, no time.

Version v: the policy after v updates. B rows make an update. A row's *deadline* is its oldest token's version + η, so
it may be consumed in no update after its deadline. O(d): rows reserved, running or ready, outside the update, with a
deadline of at most d. f: rows already in update v. What holds at all times, for every d >= v - 1:

    O(d) + f <= (d - v + 1)·B         (f = 0 where d = v - 1: nothing outstanding is overdue)

that is, all rows due by d fit into the updates up to d. `admit` and `claim` refuse whatever would break it. `ledger.py`
says which rows these are; one `Accounts` serves all shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Accounts:
    """`changes` counts the events after which something refused before may be granted: capacity came back, a deadline
    moved, v advanced, an incarnation began. (A claim alone never helps anybody.)"""

    def __init__(self, batch_rows: int, max_staleness: int, version: int = 0, incarnation: int = 0) -> None:
        if batch_rows < 1:
            raise ValueError(f"batch_rows: {batch_rows}; must be at least 1")
        if max_staleness < 0:
            raise ValueError(f"max_staleness: {max_staleness}; must not be negative")
        self.batch_rows = batch_rows
        self.max_staleness = max_staleness
        self.version = version
        self.filled = 0
        self.incarnation = incarnation
        self.outstanding: dict[int, int] = {}
        self.awaited_shards = 0
        self.changes = 0

    def due_by(self, deadline: int) -> int:
        """O(d)."""
        return sum(rows for due, rows in self.outstanding.items() if due <= deadline)

    def admissible(self, deadline: int, rows: int) -> bool:
        """For every d from the deadline on: O(d) + f + rows <= (d - v + 1)·B. O only steps at deadlines in use."""
        if self.awaited_shards or deadline > self.version + self.max_staleness:
            return False
        later = [due for due in self.outstanding if due > deadline]
        return all(self._has_room(due, rows) for due in (deadline, *later))

    def admit(self, deadline: int, rows: int) -> None:
        assert self.admissible(deadline, rows), f"{rows} rows due {deadline} were not admissible"
        self._add(deadline, rows)

    def admit_groups(self, deadline: int, rows: int, groups: int) -> int:
        """Admits up to `groups` groups of `rows` rows each; how many."""
        for admitted in range(groups):
            if not self.admissible(deadline, rows):
                return admitted
            self._add(deadline, rows)
        return groups

    def blocked_at(self, deadline: int, rows: int) -> int | None:
        """The first d in [v, deadline) at which taking these rows leaves no room for those due by then. O only steps at
        deadlines in use."""
        steps = sorted({self.version, *self.outstanding})
        return next((d for d in steps if self.version <= d < deadline and not self._has_room(d, rows)), None)

    def claimable(self, deadline: int, rows: int) -> bool:
        """For every d in [v, deadline): O(d) + f + rows <= (d - v + 1)·B."""
        return not self.awaited_shards and deadline >= self.version and self.blocked_at(deadline, rows) is None

    def claim(self, deadline: int, rows: int) -> None:
        """Moves outstanding rows into update v; v advances when that is full."""
        assert self.claimable(deadline, rows), f"{rows} rows due {deadline} were not claimable"
        self._remove(deadline, rows)
        self.filled += rows
        assert self.filled <= self.batch_rows, f"update {self.version} holds {self.filled} of {self.batch_rows} rows"
        if self.filled == self.batch_rows:
            self.version += 1
            self.filled = 0
            self.changes += 1

    def claim_prefix(self, update: int, incarnation: int, entries: Sequence[tuple[int, int]]) -> int:
        """Claims (deadline, rows) entries for `update` until one does not fit; how many."""
        for claimed, (deadline, rows) in enumerate(entries):
            is_current = update == self.version and incarnation == self.incarnation
            if not is_current or not self.claimable(deadline, rows):
                return claimed
            self.claim(deadline, rows)
        return len(entries)

    def shift(self, old: int, new: int, rows: int) -> None:
        """The oldest token of these rows turned out to be younger than their reservation allowed for."""
        assert new >= old, f"a deadline moves later only: {old} -> {new}"
        self._remove(old, rows)
        self._add(new, rows)
        self.changes += 1

    def retire(self, deadline: int, rows: int) -> None:
        """Outstanding rows that will never be claimed: dropped, lost or expired."""
        self._remove(deadline, rows)
        self.changes += 1

    def begin(self, incarnation: int, version: int, num_shards: int) -> None:
        """A new trainer starts at `version`, its checkpoint's. What its predecessors claimed since is in no update, and
        nothing is granted before every shard has said, by `unclaim`, what of that it still has."""
        assert incarnation > self.incarnation, f"incarnation {incarnation} after {self.incarnation}"
        assert version <= self.version, f"version {version} is ahead of {self.version}"
        self.incarnation = incarnation
        self.version = version
        self.filled = 0
        self.awaited_shards = num_shards
        self.changes += 1

    def unclaim(self, incarnation: int, entries: Iterable[tuple[int, int]]) -> None:
        """All (deadline, rows) of one shard that this incarnation has undone: they are outstanding again."""
        for deadline, rows in entries:
            self._add(deadline, rows)
        if incarnation == self.incarnation and self.awaited_shards:
            self.awaited_shards -= 1
        self.changes += 1

    def _has_room(self, d: int, rows: int) -> bool:
        return self.due_by(d) + self.filled + rows <= (d - self.version + 1) * self.batch_rows

    def _add(self, deadline: int, rows: int) -> None:
        self.outstanding[deadline] = self.outstanding.get(deadline, 0) + rows

    def _remove(self, deadline: int, rows: int) -> None:
        left = self.outstanding.get(deadline, 0) - rows
        assert left >= 0, f"{rows} rows due {deadline} leave the account, {left + rows} are in it"
        if left:
            self.outstanding[deadline] = left
        else:
            self.outstanding.pop(deadline, None)


def tally(entries: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """(deadline, rows) entries added up by deadline, earliest first."""
    total: dict[int, int] = {}
    for deadline, rows in entries:
        total[deadline] = total.get(deadline, 0) + rows
    return sorted(total.items())
