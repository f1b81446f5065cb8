"""The consumers' side of a shard: take, acknowledge, commit, drop."""

from __future__ import annotations

from collections.abc import Sequence

from transfer_queue import wire
from transfer_queue.core import Columns, Core
from transfer_queue.errors import RowRefused, ShardLost, StaleIncarnation
from transfer_queue.lanes import Lane
from transfer_queue.sampling import Basket
from transfer_queue.states import Group, Pick
from transfer_queue.waiters import Waiter, client_name, patience


class Delivery:
    def __init__(self, core: Core) -> None:
        self._core = core

    def take(self, peer: bytes, request: wire.Take, columns: Columns) -> None:
        """Parks the request; `try_take` does the rest."""
        lane = self._core.ledger.lane(request.consumer)
        if lane.spec.training != (request.update is not None):
            rule = "a training take names its update" if lane.spec.training else "only a training take names an update"
            raise RowRefused(f"update: {request.update} from {request.consumer!r}; {rule}")
        if request.budget is not None and request.budget[0] not in lane.spec.columns:
            raise RowRefused(f"budget: {request.budget[0]!r}; {request.consumer!r} reads {lane.spec.columns}")
        self._basket(request)
        if request.done:
            self._core.ledger.ack(lane, request.done)
        self._core.waiters.add(Waiter(peer, request, self._core.now + patience(request)))

    def try_take(self, waiter: Waiter, request: wire.Take) -> None:
        core = self._core
        lane = core.ledger.lane(request.consumer)
        waiter.waits_for = "rows"
        if request.update is not None:
            self._try_training_take(waiter, request, lane, request.update)
            return
        picks = core.ledger.lease(lane, self._basket(request), core.now, client_name(waiter.peer))
        if picks and not self._deliver(waiter, request, picks, False):
            core.ledger.return_rows(lane, picks)

    def _try_training_take(self, waiter: Waiter, request: wire.Take, lane: Lane, update: int) -> None:
        core = self._core
        state = core.clock.snapshot()
        if request.incarnation < state.incarnation:
            raise StaleIncarnation(f"incarnation: {request.incarnation}; {state.incarnation} has replaced it")
        if request.incarnation > state.incarnation or state.version < update:
            waiter.waits_for = f"update {update} of incarnation {request.incarnation}"
            return
        if state.is_broken:
            raise ShardLost(f"incarnation: {request.incarnation}; a shard has died since, and update {update} with it")
        groups = core.updates.take_undelivered(request.incarnation, update, self._basket(request), waiter.address)
        if groups or state.version > update:
            self._deliver_training(waiter, request, update, groups)
            return
        self._claim(waiter, request, lane, update, by_deadline=lane.is_by_deadline)

    def _claim(self, waiter: Waiter, request: wire.Take, lane: Lane, update: int, by_deadline: bool) -> None:
        """Asks for what the lane's order puts first; if all of that is refused, for what is due first, which never is
        for long."""
        core = self._core
        groups = core.updates.nominate(lane, self._basket(request), by_deadline)
        if not groups:
            return
        waiter.waits_for = core.clock.snapshot().refuses_by
        waiter.asking = True

        def claimed(granted: int) -> None:
            waiter.asking = False
            core.updates.grant(groups[:granted], request.incarnation, update, waiter.address)
            for group in groups[:granted]:
                core.log("taken", group, update=update)
            for retired, reason in core.updates.refuse(lane, groups[granted:]):
                core.retired("dropped", [retired], reason=reason)
            if granted:
                self._deliver_training(waiter, request, update, groups[:granted])
                return
            core.waiters.remind(waiter)
            if not by_deadline and waiter in core.waiters:
                self._claim(waiter, request, lane, update, by_deadline=True)

        entries = [(group.deadline, group.size) for group in groups]
        may_drop = by_deadline and core.config.late != "wait"
        core.clock.claim(update, request.incarnation, entries, may_drop, claimed)

    def _deliver_training(self, waiter: Waiter, request: wire.Take, update: int, groups: Sequence[Group]) -> None:
        """Whoever asked may be gone; its rows stay in the update and are given to the next one who asks for it."""
        core = self._core
        is_full = core.clock.snapshot().version > update
        closed = is_full and not core.updates.has_undelivered(request.incarnation, update, waiter.address)
        picks = [(group, group.all) for group in groups]
        if not self._deliver(waiter, request, picks, closed) and groups:
            core.updates.keep_undelivered(groups)
            core.note_change()

    def _deliver(self, waiter: Waiter, request: wire.Take, picks: Sequence[Pick], closed: bool) -> bool:
        core = self._core
        spec = core.ledger.lane(request.consumer).spec
        spans = [span for group, bits in picks for span in group.spans(bits)]
        versions = [version for group, bits in picks for version in group.versions_of(bits)]
        if spans and request.is_near:
            where = core.storage.locate(spans, spec.columns, spec.optional)
            near = wire.Delivered(request.id, spans, where.columns, versions, closed, where.placed, where.layouts)
            return core.answer(waiter, near)
        columns = core.storage.gather(spans, spec.columns, spec.optional) if spans else {}
        return core.answer(waiter, wire.Delivered(request.id, spans, [], versions, closed), columns)

    def _basket(self, request: wire.Take) -> Basket[Group]:
        if request.budget is None:
            return Basket(request.max_rows)
        name, budget = request.budget

        def cost(group: Group, bits: int) -> int:
            return self._core.storage.length_of(list(group.spans(bits)), name)

        return Basket(request.max_rows, budget, cost)

    def ack(self, peer: bytes, request: wire.Ack, columns: Columns) -> wire.Message:
        ledger = self._core.ledger
        return wire.Done(request.id, ledger.ack(ledger.lane(request.consumer), request.spans))

    def commit(self, peer: bytes, request: wire.Commit, columns: Columns) -> wire.Message:
        state = self._core.clock.snapshot()
        if request.incarnation < state.incarnation:
            raise StaleIncarnation(f"incarnation: {request.incarnation}; {state.incarnation} has replaced it")
        return wire.Done(request.id, self._core.updates.commit(request.spans, request.incarnation, request.update))

    def close_update(self, peer: bytes, request: wire.CloseUpdate, columns: Columns) -> None:
        """Answers when the clock has."""
        core = self._core

        def closed(has_ended: bool) -> None:
            text = f"update: {request.update} of incarnation {request.incarnation} cannot end short; the clock is at"
            state = core.clock.snapshot()
            rule = "it must hold some rows, and none may be outstanding that would be due with it"
            where = f"update {state.version} of incarnation {state.incarnation} with {state.filled} rows"
            refused = wire.Refused(request.id, RowRefused.__name__, f"{text} {where}: {rule}")
            core.send(peer, wire.Done(request.id, 1) if has_ended else refused, {})

        core.clock.close_update(request.update, request.incarnation, closed)

    def begin(self, peer: bytes, request: wire.Begin, columns: Columns) -> None:
        """Answers when the clock has. A repeated one is the same one."""
        core = self._core

        def begun(is_current: bool) -> None:
            state = core.clock.snapshot()
            text = f"incarnation: {request.incarnation} at version {request.version}; the clock has incarnation"
            rule = "a later incarnation begins at its version or before"
            where = f"{state.incarnation} at version {state.version}"
            kind = StaleIncarnation if request.incarnation <= state.incarnation else RowRefused
            refused = wire.Refused(request.id, kind.__name__, f"{text} {where}: {rule}")
            core.send(peer, wire.Done(request.id, 1) if is_current else refused, {})

        core.clock.begin(request.incarnation, request.version, request.lost, begun)

    def drop(self, peer: bytes, request: wire.Drop, columns: Columns) -> wire.Message:
        retired = self._core.ledger.drop(request.spans, request.reason, request.again)
        self._core.retired("dropped", retired, reason=request.reason)
        return wire.Done(request.id, sum(group.size for group, _ in retired))

    def consumer_lost(self, peer: bytes, request: wire.ConsumerLost, columns: Columns) -> wire.Message:
        core = self._core
        for waiter in core.waiters:
            if isinstance(waiter.request, wire.Take) and client_name(waiter.peer) == request.client:
                core.give_up(waiter)
        return wire.Done(request.id, core.ledger.lose_holder(request.client))

    def decline(self, peer: bytes, request: wire.Decline, columns: Columns) -> None:
        """An answer reached somebody who had stopped waiting for it: what it gave away is taken back."""
        core = self._core
        if not request.consumer:
            groups = [group for group in core.ledger.groups_of(request.spans) if group.filled != group.all]
            core.retired("lost", core.ledger.lose(groups, "undelivered"))
            return
        lane = core.ledger.lane(request.consumer)
        if lane.spec.training:
            core.updates.keep_undelivered([group for group in core.ledger.groups_of(request.spans) if group.claim])
            core.note_change()
            return
        core.ledger.return_rows(lane, core.ledger.find(request.spans))
