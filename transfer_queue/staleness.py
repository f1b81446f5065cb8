"""The staleness rule as arithmetic on a few integers. Pure: no rows, no sockets, no time.

Version v: the policy after v updates. B rows make an update. A row's *deadline* is its oldest token's version + η, so
it may be consumed in no update after its deadline. O(d): rows reserved, running or ready, outside the update, with a
deadline of at most d. f: rows already in update v. What holds at all times, for every d >= v - 1:

    O(d) + f <= (d - v + 1)·B + S     (f = 0 where d = v - 1),    f <= B

that is, all rows due by d fit into the updates up to d, but for the *surplus*: S rows at most, 0 unless told otherwise,
which are admitted although nothing promises them a place. Which ones they are shows when an update is full without
them: what is overdue then, S rows at most, is never claimed, and its shards retire it. `admit` and `claim` refuse
whatever would break this. `ledger.py` says which rows these are; one `Accounts` serves all shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


class Accounts:
    """`changes` counts the events after which something refused before may be granted: capacity came back, a deadline
    moved, v advanced, an incarnation began. (A claim alone never helps anybody.) It also moves when those who may drop
    what is late are to hear of a refusal.

    is_broken: a shard has died, and what it held of the update that is being filled is gone or unsure; nothing is
    granted before an incarnation `begin`s anew.

    refused: the (deadline, rows) entry that such a shard was refused, until something changes. Shards take turns at
    dropping, because one group is enough: is_turn_given from `give_turn` to `end_turn`."""

    def __init__(
        self,
        batch_rows: int,
        max_staleness: int,
        version: int = 0,
        incarnation: int = 0,
        awaited_shards: int = 0,
        surplus_rows: int = 0,
    ) -> None:
        if batch_rows < 1:
            raise ValueError(f"batch_rows: {batch_rows}; must be at least 1")
        if max_staleness < 0:
            raise ValueError(f"max_staleness: {max_staleness}; must not be negative")
        if surplus_rows < 0:
            raise ValueError(f"surplus_rows: {surplus_rows}; must not be negative")
        self.batch_rows = batch_rows
        self.surplus_rows = surplus_rows
        self.max_staleness = max_staleness
        self.version = version
        self.filled = 0
        self.incarnation = incarnation
        self.outstanding: dict[int, int] = {}
        self.awaited_shards = awaited_shards
        self.is_broken = False
        self.changes = 0
        self.refused: tuple[int, int] | None = None
        self.is_turn_given = False

    @property
    def is_granting(self) -> bool:
        return not self.awaited_shards and not self.is_broken

    def due_by(self, deadline: int) -> int:
        """O(d)."""
        return sum(rows for due, rows in self.outstanding.items() if due <= deadline)

    def admissible(self, deadline: int, rows: int) -> bool:
        """For every d from the deadline on: O(d) + f + rows <= (d - v + 1)·B + S. O only steps at deadlines in use."""
        if not self.is_granting or not self.version <= deadline <= self.version + self.max_staleness:
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
        """For every d in [v, deadline): O(d) + f + rows <= (d - v + 1)·B + S; and the update has room."""
        if not self.is_granting or deadline < self.version or self.filled + rows > self.batch_rows:
            return False
        return self.blocked_at(deadline, rows) is None

    def claim(self, deadline: int, rows: int) -> None:
        """Moves outstanding rows into update v; v advances when that is full."""
        assert self.claimable(deadline, rows), f"{rows} rows due {deadline} were not claimable"
        self._remove(deadline, rows)
        self.filled += rows
        assert self.filled <= self.batch_rows, f"update {self.version} holds {self.filled} of {self.batch_rows} rows"
        if self.filled == self.batch_rows:
            self._advance()

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
        self._change()

    def retire(self, deadline: int, rows: int) -> None:
        """Outstanding rows that will never be claimed: dropped, lost or expired."""
        self._remove(deadline, rows)
        self._change()

    def can_close(self) -> bool:
        """Whether update v may end with the rows it has: there are some, and what is outstanding fits into the updates
        after it, for every d >= v: O(d) <= (d - v)·B + S."""
        due = {self.version, *(due for due in self.outstanding if due > self.version)}
        fits = all(self.due_by(d) <= (d - self.version) * self.batch_rows + self.surplus_rows for d in due)
        return self.filled > 0 and fits and self.is_granting

    def close(self, update: int, incarnation: int) -> bool:
        """Ends the update short, as a run's last one may. True if it has ended."""
        if incarnation != self.incarnation or update > self.version:
            return False
        if update == self.version and self.can_close():
            self._advance()
        return update < self.version

    # What is late

    def note_refused(self, deadline: int, rows: int) -> None:
        """A shard that may drop what is late could not claim this entry."""
        if self.refused is None and not self.is_turn_given and self.blocked_at(deadline, rows) is not None:
            self.refused = (deadline, rows)
            self.changes += 1

    @property
    def blocked(self) -> int | None:
        """Unready rows due by then keep ready ones waiting, and it is nobody's turn yet to drop any."""
        return None if self.refused is None or self.is_turn_given else self.blocked_at(*self.refused)

    def give_turn(self) -> int | None:
        """The shard that asks may drop rows due by the deadline returned, and must `end_turn`. None: it may not."""
        blocked = self.blocked
        self.is_turn_given = self.is_turn_given or blocked is not None
        return blocked

    def end_turn(self) -> None:
        """What was dropped in the turn, if anything, has been retired."""
        self.is_turn_given = False
        self._change()

    # Incarnations

    def begin(self, incarnation: int, version: int, num_shards: int) -> None:
        """A new trainer starts at `version`, its checkpoint's. What its predecessors claimed since is in no update, and
        nothing is granted before every shard has said, by `unclaim`, what of that it still has."""
        assert incarnation > self.incarnation, f"incarnation {incarnation} after {self.incarnation}"
        assert version <= self.version, f"version {version} is ahead of {self.version}"
        self.incarnation = incarnation
        self.version = version
        self.filled = 0
        self.awaited_shards = num_shards
        self.is_broken = False
        self.is_turn_given = False
        self._change()

    def enter(self, entries: Iterable[tuple[int, int]]) -> None:
        """A shard has come, with these (deadline, rows) outstanding."""
        for deadline, rows in entries:
            self._add(deadline, rows)

    def break_off(self) -> None:
        """A shard has died."""
        self.is_broken = True
        self._change()

    def recover(self, version: int, filled: int, incarnation: int, outstanding: Mapping[int, int]) -> None:
        """After a death, from what was written down: (deadline: rows), added to those of other shards."""
        self.version, self.filled, self.incarnation = version, filled, incarnation
        for deadline, rows in outstanding.items():
            self._add(deadline, rows)
        self.changes += 1

    def unclaim(self, incarnation: int, entries: Iterable[tuple[int, int]]) -> None:
        """All (deadline, rows) of one shard that this incarnation has undone: they are outstanding again."""
        for deadline, rows in entries:
            self._add(deadline, rows)
        if incarnation == self.incarnation and self.awaited_shards:
            self.awaited_shards -= 1
        self._change()

    def _advance(self) -> None:
        self.version += 1
        self.filled = 0
        self._change()

    def _change(self) -> None:
        self.changes += 1
        self.refused = None

    def _has_room(self, d: int, rows: int) -> bool:
        return self.due_by(d) + self.filled + rows <= (d - self.version + 1) * self.batch_rows + self.surplus_rows

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
