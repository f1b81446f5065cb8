"""Drops what the late policy gives up, when it is this shard's turn, and the surplus whose deadline has passed.

A claim that the rule refuses because of unready rows makes the clock name their deadline to every shard. Those that
have such rows, and whose policy gives some up, ask for the turn; one gets it, drops, and the claim is tried again.
"""

from __future__ import annotations

from transfer_queue.clock_messages import NOT_BLOCKED
from transfer_queue.core import Core
from transfer_queue.policies import Blocker, choose_late, late_policy
from transfer_queue.states import Group


class Lateness:
    def __init__(self, core: Core) -> None:
        self._core = core
        self._policy = late_policy(core.config.late)
        self._lane = next((lane for lane in core.ledger.lanes.values() if lane.spec.training), None)
        self._seen: tuple[int, int] | None = None
        self._is_asking = False
        self._seen_version = 0

    def follow(self) -> None:
        """Asks for the turn if there is something to drop that was not there before."""
        core = self._core
        state = core.clock.snapshot()
        if core.clock.surplus_rows and (state.version != self._seen_version or core.has_overdue):
            self._drop_overdue(state.version)
        if state.blocked == NOT_BLOCKED or self._is_asking or (state.changes, core.ledger.puts) == self._seen:
            return
        self._seen = (state.changes, core.ledger.puts)
        if self._choose(state.blocked):
            self._is_asking = True
            core.clock.turn(self._take_turn)

    def _drop_overdue(self, version: int) -> None:
        """Groups that no update may hold any more; without a surplus there are none. One that the clock is asked for is
        looked at again when it has answered."""
        core = self._core
        self._seen_version = version
        overdue = (
            core.ledger.partitions[self._lane.spec.partition].overdue_at(version) if self._lane is not None else []
        )
        core.has_overdue = any(group.claim is not None for group in overdue)
        core.retired("dropped", core.ledger.drop_overdue(overdue), reason="surplus")

    def _take_turn(self, deadline: int) -> None:
        """Chooses again: what was late when it asked may be ready by now."""
        core = self._core
        self._is_asking = False
        if deadline != NOT_BLOCKED:
            core.retired("dropped", core.ledger.drop_late(self._choose(deadline)), reason="late")
            core.clock.end_turn()

    def _choose(self, deadline: int) -> list[Group]:
        if self._lane is None:
            return []
        at = self._lane.position
        blockers = {
            Blocker(
                group=group.number, attempt=group.attempt, deadline=group.deadline, num_rows=group.size,
                num_unready=group.num_waiting(at), age_s=self._core.now - group.born_s,
            ): group
            for group in self._core.ledger.partitions[self._lane.spec.partition].unready_by(deadline)
        }  # fmt: skip
        return [blockers[blocker] for blocker in choose_late(self._policy, list(blockers))]
