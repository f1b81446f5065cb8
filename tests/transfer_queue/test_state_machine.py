"""Random histories of two shards on one account, through the production code, against what must always hold.

FLOWRL_HISTORIES=20 makes twenty times as many.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.transfer_queue.conftest import CONSUMERS, DirectShard
from transfer_queue import wire
from transfer_queue.clock import LocalClock
from transfer_queue.config import QueueConfig
from transfer_queue.policies import Blocker
from transfer_queue.rows import RowKey
from transfer_queue.staleness import Accounts

GROUP_SIZE = 2
BATCH_ROWS = 4
LEASE_S = 10.0
PRODUCERS = ("p", "q")
ROW_BYTES = 8
NEVER_S = 1e6
HERE = "tests.transfer_queue.test_state_machine"
TIMES = int(os.environ.get("FLOWRL_HISTORIES", "1"))
LEAST_REQUESTS = 100_000
which = st.integers(0, 1)
choice = st.integers(0, 1 << 16)
requests: Counter[str] = Counter()


def last_two(blockers: Sequence[Blocker]) -> Sequence[Blocker]:
    return [blocker for blocker in blockers if blocker.attempt == 0][-2:]


class ToldShard(DirectShard):
    """Those whose requests are parked hear at once what the next request has brought them."""

    def __init__(self, config: QueueConfig, clock: LocalClock, tell: Callable[[], None]) -> None:
        super().__init__(config, clock)
        self._tell = tell

    def ask(self, *args: Any, **more: Any) -> Any:
        answer = super().ask(*args, **more)
        self._tell()
        return answer

    def pass_time(self, seconds: float) -> None:
        super().pass_time(seconds)
        self._tell()


class Histories(RuleBasedStateMachine):
    @initialize(
        max_staleness=st.sampled_from([0, 1, 2, 4]),
        late=st.sampled_from(["wait", "drop", f"{HERE}:last_two"]),
        order=st.sampled_from(["deadline", "freshest", "arrival"]),
        surplus=st.sampled_from([0, 0, 2, 6]),
    )
    def start(self, max_staleness: int, late: str, order: str, surplus: int) -> None:
        self.max_staleness = max_staleness
        self.surplus = surplus
        consumers = CONSUMERS | {"train": dataclasses.replace(CONSUMERS["train"], order=order)}
        self.accounts = Accounts(BATCH_ROWS, max_staleness, surplus_rows=surplus)
        self.parked: dict[tuple[int, int], wire.Request] = {}
        self.shards: list[ToldShard] = []
        self.shards += [
            ToldShard(
                QueueConfig(
                    endpoint="ipc://unused", consumers=consumers, first_group=first, group_stride=2, lease_s=LEASE_S,
                    late=late, max_attempts=2,
                ),
                LocalClock(self.accounts),
                self._hear,
            )
            for first in (0, 1)
        ]  # fmt: skip
        self.announced = [dict.fromkeys(PRODUCERS, 0) for _ in self.shards]
        self.reserved: list[tuple[int, str, wire.Reservation]] = []
        self.versions: dict[RowKey, int] = {}
        self.leased: dict[tuple[int, RowKey], float] = {}
        self.taken: dict[RowKey, int] = {}
        self.committed: set[RowKey] = set()
        self.seen: set[RowKey] = set()
        for at, shard in enumerate(self.shards):
            for producer in PRODUCERS:
                self.announced[at][producer] = 0
                shard.announce(producer, 0)

    # What producers do

    @rule(at=which, producer=st.sampled_from(PRODUCERS), behind=st.integers(0, 3))
    def announce(self, at: int, producer: str, behind: int) -> None:
        version = max(self.announced[at][producer], self.accounts.version - behind)
        self.announced[at][producer] = version
        self.shards[at].announce(producer, version)

    @rule(at=which, producer=st.sampled_from(PRODUCERS), groups=st.integers(1, 6))
    def reserve(self, at: int, producer: str, groups: int) -> None:
        self._reserved(at, producer, self.shards[at].reserve(producer, groups, GROUP_SIZE, row_bytes=ROW_BYTES))

    def _reserved(self, at: int, producer: str, groups: Sequence[wire.Reservation]) -> None:
        for group in groups:
            assert group.deadline == group.version + self.max_staleness
            is_alive = any((group.group, group.attempt) == (g.number, g.attempt) for g in self._groups_of(at))
            assert group.deadline >= self.accounts.version or not is_alive, (
                "one given and dropped at once may be overdue"
            )
            assert not self.seen & set(group.keys), "a key was given out twice"
            self.seen |= set(group.keys)
            self.reserved.append((at, producer, group))

    @precondition(lambda self: self.reserved)
    @rule(pick=choice, rows=st.sampled_from([(0, 1), (0,), (1,)]), age=st.integers(0, 3))
    def put(self, pick: int, rows: tuple[int, ...], age: int) -> None:
        at, producer, group = self.reserved[pick % len(self.reserved)]
        keys = [group.keys[index] for index in rows if group.keys[index] not in self.versions]
        self._put(at, producer, group, keys, age)

    def _put(self, at: int, producer: str, group: wire.Reservation, keys: list[RowKey], age: int) -> None:
        """The oldest token is at least as young as the reservation, and no younger than the policy."""
        newest = max(group.version, self.announced[at][producer])
        for key in keys:
            self.versions[key] = max(group.version, newest - age * key.index)
        if keys:
            self.shards[at].put(keys, ("tokens",), [self.versions[key] for key in keys])

    @precondition(lambda self: self.reserved)
    @rule(pick=choice, age=st.integers(0, 3))
    def finish_group(self, pick: int, age: int) -> None:
        """Others stay behind: this is where later rows must leave room for earlier ones."""
        at, producer, group = self.reserved[pick % len(self.reserved)]
        self._put(at, producer, group, [key for key in group.keys if key not in self.versions], age)
        for consumer in ("reward", "advantage"):
            while self._take(at, 100, consumer, False):
                pass

    @rule(seed=choice)
    def live_a_while(self, seed: int) -> None:
        """Both shards full of work, some of which takes long; engines of several versions; a trainer that keeps up."""
        dice = random.Random(seed)
        for _ in range(3):
            for at in (0, 1):
                for producer in PRODUCERS:
                    self.announce(at, producer, dice.randrange(3))
                    self.reserve(at, producer, 3)
            for pick in range(len(self.reserved)):
                if dice.random() < 0.7:
                    self.finish_group(pick, dice.randrange(3))
            self.reserved = [entry for entry in self.reserved if not self._is_complete(entry[2])]
            for _ in range(4):
                self._train(dice.randrange(2), dice.choice([2, 4]), dice.random() < 0.5)
                self.accounts_agree_with_a_recount()
                self.every_update_has_room_for_what_is_due()

    @rule(at=which, producer=st.sampled_from(PRODUCERS))
    def lose_producer(self, at: int, producer: str) -> None:
        complete = {(group.number, group.attempt) for group in self._groups() if group.filled == group.all}
        self.shards[at].ask(wire.ProducerLost, producer)
        assert complete == {(group.number, group.attempt) for group in self._groups() if group.filled == group.all}
        self.reserved = [(a, p, g) for a, p, g in self.reserved if (a, p) != (at, producer) or self._is_complete(g)]
        self.shards[at].announce(producer, self.announced[at][producer])

    def _is_complete(self, group: wire.Reservation) -> bool:
        return all(key in self.versions for key in group.keys)

    # What consumers do

    @rule(at=which, max_rows=st.integers(2, 6), consumer=st.sampled_from(["reward", "advantage"]), dies=st.booleans())
    def take(self, at: int, max_rows: int, consumer: str, dies: bool) -> None:
        self._take(at, max_rows, consumer, dies)

    def _take(self, at: int, max_rows: int, consumer: str, dies: bool) -> int:
        shard = self.shards[at]
        keys = shard.take(consumer, max_rows).keys
        position = self._leased(at, consumer, keys)
        assert len(keys) <= max_rows
        if not dies and keys:
            shard.put(keys, (("reward", "advantage")[position],))
            shard.ask(wire.Ack, consumer, keys)
            self.leased.update({(position, key): float("inf") for key in keys})
        return len(keys)

    def _leased(self, at: int, consumer: str, keys: Sequence[RowKey]) -> int:
        """The consumer's place in the model."""
        shard = self.shards[at]
        position = ("reward", "advantage").index(consumer)
        for key in keys:
            assert self.leased.get((position, key), -1.0) <= shard.now, f"{key} was delivered twice within its lease"
            self.leased[position, key] = shard.now + LEASE_S
        if consumer == "advantage":
            assert all(count == GROUP_SIZE for count in Counter((key.group, key.attempt) for key in keys).values())
        return position

    @rule(at=which, max_rows=st.integers(2, 6), commits=st.booleans())
    def train(self, at: int, max_rows: int, commits: bool) -> None:
        self._train(at, max_rows, commits)

    @rule()
    def train_all(self) -> None:
        while any(self._train(at, BATCH_ROWS, True) for at in (0, 1)):
            pass

    def _train(self, at: int, max_rows: int, commits: bool) -> int:
        update = self.accounts.version
        incarnation = self.accounts.incarnation
        taken = self.shards[at].take("train", max_rows, update=update, incarnation=incarnation)
        assert len(taken.keys) <= max_rows
        self._taken(update, taken.keys)
        if commits and taken.keys:
            assert self.shards[at].ask(wire.Commit, incarnation, update, taken.keys).count == len(taken.keys)
            self.committed |= set(taken.keys)
        return len(taken.keys)

    def _taken(self, update: int, keys: Sequence[RowKey]) -> None:
        for key in keys:
            assert key not in self.taken and key not in self.committed, f"{key} was trained twice"
            assert 0 <= update - self.versions[key] <= self.max_staleness
            self.taken[key] = update
        assert all(count == GROUP_SIZE for count in Counter((key.group, key.attempt) for key in keys).values())

    @rule()
    def close_short(self) -> None:
        """Granted or refused, what is outstanding still fits into the updates left (see the invariants)."""
        version, filled = self.accounts.version, self.accounts.filled
        answer = self.shards[0].ask(wire.CloseUpdate, self.accounts.incarnation, version)
        assert isinstance(answer, wire.Refused) or filled > 0
        assert self.accounts.version == version + isinstance(answer, wire.Done)

    # Who waits

    @rule(at=which, max_rows=st.integers(2, 6), consumer=st.sampled_from(["reward", "advantage"]))
    def park_take(self, at: int, max_rows: int, consumer: str) -> None:
        self._park(at, wire.Take(0, consumer, max_rows, None, None, 0, NEVER_S))

    @rule(at=which, max_rows=st.integers(2, 6), ahead=st.integers(0, 1))
    def park_train(self, at: int, max_rows: int, ahead: int) -> None:
        update = self.accounts.version + ahead
        self._park(at, wire.Take(0, "train", max_rows, None, update, self.accounts.incarnation, NEVER_S))

    @rule(at=which, producer=st.sampled_from(PRODUCERS), groups=st.integers(1, 6))
    def park_reserve(self, at: int, producer: str, groups: int) -> None:
        self._park(at, wire.Reserve(0, producer, groups, GROUP_SIZE, "train", ROW_BYTES, NEVER_S))

    def _park(self, at: int, request: wire.Take | wire.Reserve) -> None:
        fields = [getattr(request, name) for name in request.__struct_fields__[1:]]
        answer = self.shards[at].ask(type(request), *fields)
        if isinstance(answer, int):
            self.parked[at, answer] = request
        else:
            self._answered(at, request, answer)

    def _answered(self, at: int, request: Any, answer: Any) -> None:
        """By somebody who dies with what it got."""
        if isinstance(answer, wire.Reserved):
            self._reserved(at, request.producer, answer.groups)
        elif isinstance(answer, wire.Delivered) and request.consumer == "train":
            self._taken(request.update, answer.keys)
        elif isinstance(answer, wire.Delivered):
            self._leased(at, request.consumer, answer.keys)
        else:
            assert answer.error == "StaleIncarnation", answer

    @invariant()
    def nobody_waits_in_vain(self) -> None:
        """Once the news of what changed has reached both shards."""
        if not hasattr(self, "accounts"):
            return
        for _ in range(3):
            for shard in self.shards:
                shard.pass_time(0.0)
        for (at, _), request in self.parked.items():
            assert not self._could_be_answered(at, request), f"{request} waits on shard {at}"

    def _hear(self) -> None:
        for (at, number), request in list(self.parked.items()):
            answer, _ = self.shards[at].answers.pop((b"peer", number), (None, None))
            if answer is not None:
                del self.parked[at, number]
                self._answered(at, request, answer)

    def _could_be_answered(self, at: int, request: Any) -> bool:
        if isinstance(request, wire.Reserve):
            deadline = self.announced[at][request.producer] + self.max_staleness
            return self.accounts.admissible(deadline, GROUP_SIZE)
        lane = self.shards[at].ledger.lanes[request.consumer]
        if request.consumer != "train":
            return any(self._is_ready(lane, group) for group in self._groups_of(at))
        if request.incarnation < self.accounts.incarnation or request.update < self.accounts.version:
            return True
        return request.update == self.accounts.version and any(
            self._is_ready(lane, group) and self.accounts.claimable(group.deadline, GROUP_SIZE)
            for group in self._groups_of(at)
        )

    @staticmethod
    def _is_ready(lane: Any, group: Any) -> bool:
        some = group.progress[lane.position].ready & ~group.gone
        return some != 0 and (not lane.spec.takes_groups or not group.num_waiting(lane.position))

    @rule(back=st.integers(0, 2))
    def restart_trainer(self, back: int) -> None:
        """From a checkpoint some updates ago; engines load its weights."""
        version = max(0, self.accounts.version - back)
        self.accounts.begin(self.accounts.incarnation + 1, version, len(self.shards))
        for _ in range(2):
            for shard in self.shards:
                shard.pass_time(0.0)
        assert self.accounts.awaited_shards == 0
        self.taken = {key: update for key, update in self.taken.items() if update < version}
        for at, shard in enumerate(self.shards):
            for producer in PRODUCERS:
                self.announced[at][producer] = min(version, self.announced[at][producer])
                shard.announce(producer, self.announced[at][producer])

    @precondition(lambda self: self.reserved)
    @rule(pick=choice)
    def drop(self, pick: int) -> None:
        at, _, group = self.reserved[pick % len(self.reserved)]
        self.shards[at].ask(wire.Drop, [group.keys[0]], "tied")

    @rule(at=which, seconds=st.sampled_from([1.0, LEASE_S]))
    def pass_time(self, at: int, seconds: float) -> None:
        self.shards[at].pass_time(seconds)

    @rule()
    def finish_everything(self) -> None:
        """Once all that is reserved is ready, all of it can be trained, or is surplus: nothing is stuck."""
        for at, number in list(self.parked):
            self.shards[at].ask(wire.Cancel, number)
        assert not self.parked, "who cancels is answered"
        for at, producer, group in self.reserved:
            self._put(at, producer, group, [key for key in group.keys if key not in self.versions], 0)
        for at, shard in enumerate(self.shards):
            shard.pass_time(LEASE_S)
            for consumer in ("reward", "advantage"):
                while self._take(at, 100, consumer, False):
                    pass
        while self.accounts.outstanding:
            before = self.accounts.outstanding.copy()
            has_moved = any(self._train(at, BATCH_ROWS, True) for at in (0, 1)) or self.accounts.outstanding != before
            assert has_moved, f"{before} is outstanding and nothing moves"
        self.reserved = []

    # What must always hold

    @invariant()
    def accounts_agree_with_a_recount(self) -> None:
        if not hasattr(self, "accounts"):
            return
        recount: Counter[int] = Counter()
        for group in self._groups():
            if group.claim is None:
                recount[group.deadline] += group.size
        assert dict(recount) == self.accounts.outstanding
        filled = sum(1 for update in self.taken.values() if update == self.accounts.version)
        assert filled == self.accounts.filled

    @invariant()
    def every_update_has_room_for_what_is_due(self) -> None:
        if not hasattr(self, "accounts"):
            return
        version, filled = self.accounts.version, self.accounts.filled
        assert self.accounts.due_by(version - 1) <= self.surplus
        for d in range(version, version + self.max_staleness + 1):
            assert self.accounts.due_by(d) + filled <= (d - version + 1) * BATCH_ROWS + self.surplus
        for shard in self.shards:
            shard.pass_time(0.0)
        assert self.accounts.due_by(version - 1) == 0, "shards that have heard of it keep nothing that is overdue"

    @invariant()
    def memory_is_what_the_rows_need(self) -> None:
        for shard in getattr(self, "shards", []):
            groups = list(shard.ledger.partitions["train"].groups.values())
            stored = sum((group.filled & ~group.gone).bit_count() for group in groups)
            pending = sum((group.all & ~group.gone).bit_count() for group in groups)
            assert shard.shard.describe()["stored_rows"] == stored
            assert shard.ledger.promised_bytes == ROW_BYTES * pending

    def _groups(self) -> Iterator[Any]:
        for at in range(len(self.shards)):
            yield from self._groups_of(at)

    def _groups_of(self, at: int) -> Iterator[Any]:
        yield from self.shards[at].ledger.partitions["train"].groups.values()

    def teardown(self) -> None:
        requests["in all"] += sum(shard.num_asked for shard in getattr(self, "shards", []))


Histories.TestCase.settings = settings(max_examples=800 * TIMES, stateful_step_count=30, deadline=None)
Histories.TestCase = pytest.mark.timeout(600 * TIMES)(Histories.TestCase)
test_no_history_breaks_the_rules = Histories.TestCase


def test_these_histories_were_long_enough() -> None:
    if not requests:
        pytest.skip("the histories were not part of this selection")
    assert requests["in all"] >= LEAST_REQUESTS * TIMES, f"{requests} requests; more examples are needed"


def test_memory_of_what_a_surplus_leaves_over_is_free_at_once() -> None:
    """A history that once ended with bytes of dropped rows still there."""
    history = Histories()
    history.start(max_staleness=1, late="wait", order="deadline", surplus=6)
    history.live_a_while(seed=100)
    history.put(age=0, pick=0, rows=(0, 1))
    history.park_train(ahead=0, at=0, max_rows=2)
    history.every_update_has_room_for_what_is_due()
    history.memory_is_what_the_rows_need()
