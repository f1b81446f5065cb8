"""What is taken for training: READY -> LEASED -> DONE by whole groups, without a time limit. Pure.

A training lease belongs to (incarnation, update), never to a rank, and ends by `commit` or with the incarnation. The
clock decides what an update may hold; between asking it and its answer the groups are PENDING and nobody else gets
them.
"""

from __future__ import annotations

from collections.abc import Sequence

from transfer_queue.errors import RowRefused, StaleIncarnation
from transfer_queue.ledger import Ledger, Retired
from transfer_queue.rows import RowKey
from transfer_queue.states import PENDING, Accepts, Group, Lane, State


class Updates:
    """Of the one training lane of a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._undelivered: dict[tuple[int, int], list[Group]] = {}

    def nominate(self, lane: Lane, accepts: Accepts) -> list[Group]:
        """Ready groups to ask the clock for, earliest deadline first."""
        groups = []
        for unit, rows in lane.pop(accepts):
            assert isinstance(unit, Group), "a training lane holds groups"
            for row in rows:
                row.lend(lane.position, None)
            unit.claim = PENDING
            groups.append(unit)
        return groups

    def grant(self, groups: Sequence[Group], incarnation: int, update: int) -> None:
        """The clock has counted these into the update. What befell them while it was asked came too late."""
        for group in groups:
            group.claim = (incarnation, update)
            group.doom = None

    def refuse(self, lane: Lane, groups: Sequence[Group]) -> list[tuple[Retired, str]]:
        """The clock has not; they are ready again, or meet the end that befell them meanwhile, for the reason given."""
        retired = []
        for group in groups:
            group.claim = None
            for row in group.rows:
                row.lose_lease(lane.position)
            lane.push_back(group)
            if group.doom is not None:
                end, reason = group.doom
                retired.append((self._ledger.retire(group, end, reason), reason))
                if end is State.EXPIRED:
                    self._ledger.partitions[group.partition].reserve_anew(group)
        return retired

    def keep_undelivered(self, groups: Sequence[Group]) -> None:
        """They are in an update, and whoever asked for them is gone: the next one who asks gets them."""
        for group in groups:
            assert group.claim is not None, "only what is in an update is kept for it"
            self._undelivered.setdefault(group.claim, []).append(group)

    def has_undelivered(self, incarnation: int, update: int) -> bool:
        return (incarnation, update) in self._undelivered

    def take_undelivered(self, incarnation: int, update: int, accepts: Accepts) -> list[Group]:
        waiting = self._undelivered.pop((incarnation, update), [])
        taken = [group for group in waiting if accepts(group.rows)]
        self.keep_undelivered([group for group in waiting if group not in taken])
        return taken

    def commit(self, keys: Sequence[RowKey], incarnation: int, update: int) -> int:
        """LEASED -> DONE for rows that the update has trained; how many were not done before."""
        rows = []
        for row in self._ledger.find(keys):
            lane = self._ledger.partitions[row.key.partition].training
            if lane is None:
                raise RowRefused(f"keys: {row.key}; nobody trains on partition {row.key.partition!r}")
            if row.states[lane.position] is State.DONE:
                continue
            claim = row.group.claim
            if claim is not None and claim[0] > incarnation:
                raise StaleIncarnation(f"incarnation: {incarnation}; {row.key} belongs to {claim[0]}")
            if claim != (incarnation, update):
                raise RowRefused(f"keys: {row.key} is not in update {update} of incarnation {incarnation}")
            rows.append((lane, row))
        for lane, row in rows:
            self._ledger.finish(lane, row)
        return len(rows)

    def roll_back(self, incarnation: int, version: int) -> tuple[list[tuple[int, int]], list[Retired]]:
        """A new incarnation starts at `version`, its checkpoint's. Returns (deadline, rows) that are outstanding again,
        and the groups that are EXPIRED after that: their policy is a future that will not be. What had been committed
        stays done: its bytes are gone."""
        self._undelivered = {claim: groups for claim, groups in self._undelivered.items() if claim[0] >= incarnation}
        returned: list[tuple[int, int]] = []
        expired: list[Retired] = []
        for lane in self._ledger.lanes.values():
            partition = self._ledger.partitions[lane.spec.partition]
            for group in list(partition.groups.values()) if lane.spec.training else ():
                if group.claim not in (None, PENDING):
                    if not self._release(lane, group, incarnation, version):
                        continue
                    returned.append((group.deadline, len(group.rows)))
                if any(row.version > version for row in group.rows):
                    expired += self._ledger.end([group], State.EXPIRED, "rolled_back")
        for group, _ in expired:
            self._ledger.partitions[group.partition].reserve_anew(group)
        return returned, expired

    def _release(self, lane: Lane, group: Group, incarnation: int, version: int) -> bool:
        """LEASED -> READY for a group that an earlier incarnation holds and the checkpoint does not cover."""
        assert group.claim is not None, "a group to be released is in an update"
        is_open = all(row.states[lane.position] is State.LEASED for row in group.rows)
        if group.claim[0] >= incarnation or not is_open:
            return False
        if group.claim[1] < version:
            for row in group.rows:
                self._ledger.finish(lane, row)
            return False
        group.claim = None
        for row in group.rows:
            row.lose_lease(lane.position)
        lane.push(group)
        return True
