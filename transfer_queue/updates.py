"""What is taken for training: READY -> LEASED -> DONE by whole groups, without a time limit. Pure.

A training lease belongs to (incarnation, update), never to a rank, and ends by `commit` or with the incarnation. The
clock decides what an update may hold; between asking it and its answer the groups are PENDING and nobody else gets
them.
"""

from __future__ import annotations

from collections.abc import Sequence

from transfer_queue.errors import RowRefused, StaleIncarnation
from transfer_queue.lanes import Lane
from transfer_queue.ledger import Ledger, Retired
from transfer_queue.sampling import Basket
from transfer_queue.spans import Span
from transfer_queue.states import PENDING, Group, State


class Updates:
    """Of the one training lane of a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._undelivered: dict[tuple[int, int], list[Group]] = {}

    def nominate(self, lane: Lane, basket: Basket[Group], by_deadline: bool = False) -> list[Group]:
        """Ready groups to ask the clock for, in the lane's order or with the earliest deadline first."""
        groups = []
        for group, bits in lane.pop(basket, by_deadline):
            group.progress[lane.position].lend(bits, None)
            group.claim = PENDING
            groups.append(group)
        return groups

    def grant(self, groups: Sequence[Group], incarnation: int, update: int, taker: str) -> None:
        """The clock has counted these into the update. What befell them while it was asked came too late."""
        for group in groups:
            group.claim = (incarnation, update)
            group.taker = taker
            group.doom = None
            self._ledger.touch(group)

    def refuse(self, lane: Lane, groups: Sequence[Group]) -> list[tuple[Retired, str]]:
        """The clock has not; they are ready again, or meet the end that befell them meanwhile, for the reason given."""
        retired = []
        for group in groups:
            group.claim = None
            progress = group.progress[lane.position]
            progress.lose_lease(progress.leased)
            lane.push_back(group)
            if group.doom is not None:
                end, reason = group.doom
                retired.append((self._ledger.retire(group, end, reason), reason))
                if end is State.EXPIRED:
                    self._ledger.partitions[group.partition].reserve_anew(group)
        return retired

    def keep_undelivered(self, groups: Sequence[Group], for_their_taker: bool = False) -> None:
        """They are in an update, and did not reach who asked for them: the next one who asks gets them.
        for_their_taker: they may have reached it, so nobody else gets them."""
        for group in groups:
            assert group.claim is not None, "only what is in an update is kept for it"
            group.taker = group.taker if for_their_taker else ""
            self._undelivered.setdefault(group.claim, []).append(group)

    def has_undelivered(self, incarnation: int, update: int, taker: str) -> bool:
        """For this one."""
        return any(group.taker in ("", taker) for group in self._undelivered.get((incarnation, update), ()))

    def take_undelivered(self, incarnation: int, update: int, basket: Basket[Group], taker: str) -> list[Group]:
        waiting = self._undelivered.pop((incarnation, update), [])
        mine = [group for group in waiting if group.taker in ("", taker)]
        taken = [group for group in mine if basket.fill(group, group.all, True)]
        self.keep_undelivered([group for group in waiting if group not in taken], for_their_taker=True)
        return taken

    def commit(self, spans: Sequence[Span], incarnation: int, update: int) -> int:
        """LEASED -> DONE for rows that the update has trained; how many were not done before."""
        picks = []
        for group, bits in self._ledger.find(spans):
            lane = self._ledger.partitions[group.partition].training
            if lane is None:
                raise RowRefused(f"keys: {group.identity}; nobody trains on partition {group.partition!r}")
            bits &= ~group.progress[lane.position].done
            if not bits:
                continue
            if group.claim is not None and group.claim[0] > incarnation:
                raise StaleIncarnation(f"incarnation: {incarnation}; {group.identity} belongs to {group.claim[0]}")
            if group.claim != (incarnation, update):
                raise RowRefused(f"keys: {group.identity} is not in update {update} of incarnation {incarnation}")
            picks.append((lane, group, bits))
        for lane, group, bits in picks:
            self._ledger.finish(lane, group, bits)
        return sum(bits.bit_count() for _, _, bits in picks)

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
                    returned.append((group.deadline, group.size))
                if max(group.versions) > version:
                    expired += self._ledger.end([group], State.EXPIRED, "rolled_back")
        for group, _ in expired:
            self._ledger.partitions[group.partition].reserve_anew(group)
        return returned, expired

    def _release(self, lane: Lane, group: Group, incarnation: int, version: int) -> bool:
        """LEASED -> READY for a group that an earlier incarnation holds and the checkpoint does not cover."""
        assert group.claim is not None, "a group to be released is in an update"
        progress = group.progress[lane.position]
        if group.claim[0] >= incarnation or progress.leased != group.all:
            return False
        if group.claim[1] < version:
            self._ledger.finish(lane, group, progress.leased)
            return False
        group.claim = None
        self._ledger.touch(group)
        progress.lose_lease(progress.leased)
        lane.push(group)
        return True
